"""The options of all jobs and plugins are those of `options.txt`: a new, renamed or lost one is a decision.

`python tests/options/test_options.py` writes the file anew, for a change that means to.
"""

from __future__ import annotations

from pathlib import Path

from clip_base.jobs import plugins
from clip_base.jobs.schema import describe

STORED = Path(__file__).with_name("options.txt")
OURS = ("clip_base", "regionclip")


def options() -> list[str]:
    """Returns a line per option: `job: key`, or `group plugin: key`, whichever jobs may have it."""
    lines, groups, read = [], [plugins.JOBS], 0
    while read < len(groups):
        group = groups[read]
        for name, point in plugins.found(group).items():
            if point.module.partition(".")[0] not in OURS:
                continue
            for option in describe(point).options:
                lines.append(f"{name if group == plugins.JOBS else f'{group} {name}'}: {option.key}")
                if option.group and option.group not in groups:
                    groups.append(option.group)
        read += 1
    return sorted(lines)


def test_every_option_is_a_decision() -> None:
    found, stored = options(), STORED.read_text().splitlines()
    changes = [f"new:  {line}" for line in found if line not in stored]
    changes += [f"gone: {line}" for line in stored if line not in found]
    assert found == stored, (
        "the options are others than tests/options/options.txt says. If that is meant, run "
        "`python tests/options/test_options.py` and commit the file with the change:\n" + "\n".join(changes)
    )


if __name__ == "__main__":
    STORED.write_text("\n".join(options()) + "\n")
