"""Mutations of files, by form: what a bad disk, a cut copy, another program or an enemy makes of them."""

from __future__ import annotations

import csv
import io
import json
import random
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_trees import change_tree, dump, values

Mutator = Callable[[random.Random, bytes], bytes]

# What breaks readers of texts: marks of each format, numbers beyond every type, names that lead elsewhere.
TOKENS = (
    *(
        b'"',
        b"'",
        b",",
        b"\t",
        b"\n",
        b"\r",
        b"\r\n",
        b"\0",
        b"{",
        b"[",
        b"]",
        b"}",
        b":",
        b"#",
        b"&a ",
        b"*a",
    ),
    *(b"null", b"NaN", b"-Infinity", b"1e999", b"-0", b"true", b"9" * 5000, b"[" * 3000, b'{"a":' * 2000),
    *(b"\xff\xfe", b"\xef\xbb\xbf", b'"\\ud800"', b"\xed\xa0\x80", b"\xc0\x80", b"${x}", b"${oc.env:HOME}"),
    *(b"<<: ", b"!!python/object/apply:os.system [id]", b"---\n", b"? ", b"2024-13-45", b"0x1F", b"1_000"),
    *(
        b"../../etc/passwd",
        b"/etc/passwd",
        b"C:\\x",
        b"x" * 70_000,
        b"=1+1",
        b"<!ENTITY a 'b'>",
        b"&a;",
        b"</a>",
    ),
    *(b"<!DOCTYPE x [<!ENTITY a SYSTEM 'file:///etc/passwd'>]>", b"\xe2\x80\xae", b" " * 3000, b"\\N", b"-1"),
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
WIDE = (*NUMBERS, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Changes bytes: flips, cuts, insertions, repetitions, numbers of every width."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        kind, at = rng.randrange(9), rng.randrange(len(changed) + 1)
        at = min(at, rng.randrange(200)) if rng.random() < 0.4 else at  # headers decide most
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[at : at + rng.choice((1, 2, 8, 100, 1000))]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.choice((1, 4, 50, 600)))
        elif kind == 3:
            changed = changed[:at]
        elif kind == 4:
            other = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[min(at, other) : max(at, other)][:5000]
        elif kind == 5:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
            largest = 256 ** struct.calcsize(form) - 1
            changed[at : at + struct.calcsize(form)] = struct.pack(form, min(rng.choice(WIDE), largest))
        elif kind == 6:
            length = rng.choice((1, 16, 500))
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == 7 and at < len(changed):
            changed[at] = rng.randrange(256)
        else:
            changed += rng.choice((b"\0" * 100, bytes(changed[:3000]), b"\n"))
    return bytes(changed)


def mutate_text(rng: random.Random, data: bytes) -> bytes:
    """Changes a text: tokens put in, lines moved, another encoding."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        kind, at = rng.randrange(7), rng.randrange(len(data) + 1)
        if kind < 3:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 3:
            lines = data.split(b"\n")
            rng.shuffle(lines)
            data = b"\n".join(lines)
        elif kind == 4:
            text = data.decode("utf-8", "replace")
            coding = rng.choice(("utf-16", "utf-32", "cp1252", "gb18030", "utf-8-sig", "latin-1", "utf-7"))
            data = text.encode(coding, "replace")
        elif kind == 5:
            words = data.split(b" ")
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            data = b" ".join(words)
        else:
            data = mutate_bytes(rng, data)
    return data


def mutate_json(rng: random.Random, data: bytes) -> bytes:
    """Changes JSON: its tree, or its text."""
    if rng.random() < 0.3:
        return mutate_text(rng, data)
    try:
        return dump(change_tree(rng, json.loads(data)))
    except (TypeError, ValueError, RecursionError, UnicodeError):
        return mutate_text(rng, data)


def mutate_json_lines(rng: random.Random, data: bytes) -> bytes:
    """Changes one line of JSON Lines, or the text."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    if rng.random() < 0.3 or not lines[at].strip():
        return mutate_text(rng, data)
    lines[at] = mutate_json(rng, lines[at])
    return b"\n".join(lines)


def mutate_yaml(rng: random.Random, data: bytes) -> bytes:
    """Changes YAML: its tree, which JSON is a way to write, or its text."""
    if rng.random() < 0.5:
        return mutate_text(rng, data)
    from omegaconf import OmegaConf

    tree = OmegaConf.to_container(OmegaConf.create(data.decode()))
    head = b"".join(line + b"\n" for line in data.split(b"\n") if line.startswith(b"#"))
    return head + dump(change_tree(rng, tree))


def mutate_csv(rng: random.Random, data: bytes) -> bytes:
    """Changes cells of a table, or its text."""
    if rng.random() < 0.5:
        return mutate_text(rng, data)
    rows = list(csv.reader(io.StringIO(data.decode()), delimiter="\t" if b"\t" in data else ","))
    for _ in range(rng.choice((1, 2, 5))):
        row = rng.choice(rows)
        if row:
            row[rng.randrange(len(row))] = str(values(rng))
        if rng.random() < 0.3:
            row.append("more")
    out = io.StringIO()
    csv.writer(out, delimiter="\t" if b"\t" in data else ",", quoting=rng.choice((0, 1))).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Changes the header of safetensors, the numbers, or any bytes."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    kind = rng.randrange(6)
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1 and len(body) > 8:  # NaN, infinity and noise among the numbers
        at = rng.randrange(len(body) // 4) * 4
        body[at : at + 4] = rng.choice(
            (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\xff\xff", rng.randbytes(4))
        )
    elif kind == 2 and header.get("__metadata__"):
        notes = header["__metadata__"]
        key = rng.choice(list(notes))
        changed = mutate_json(rng, notes[key].encode()).decode("utf-8", "replace")
        notes[key] = changed if rng.random() < 0.8 else notes.pop(key) and ""
    elif kind == 3:
        names = [name for name in header if name != "__metadata__"]
        tensor = header[rng.choice(names)]
        part = rng.choice(("dtype", "shape", "data_offsets"))
        types = ("F16", "BF16", "F32", "F64", "I8", "I64", "BOOL", "F8_E4M3", "U16", "X")
        tensor[part] = (
            rng.choice(types) if part == "dtype" else [rng.choice(WIDE) for _ in range(rng.randrange(5))]
        )
    elif kind == 4:
        names = [name for name in header if name != "__metadata__"]
        name = rng.choice(names)
        new = rng.choice((f"{name}.3000000", name.replace("0", "99999999"), "", "x", "\0", f"module.{name}"))
        header[new] = header.pop(name)
    else:
        header = change_tree(rng, header)
    packed = dump(header)
    return struct.pack("<Q", len(packed)) + packed + bytes(body)


def mutate_zip(rng: random.Random, data: bytes) -> bytes:
    """Changes an entry of a zip file, checksums kept right, its names, or any bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(out, "w") as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of names that stand twice
        names = old.namelist()
        chosen = rng.choice([name for name in names if name.endswith(".pkl")] or names)
        chosen = chosen if rng.random() < 0.7 else rng.choice(names)
        for name in names:
            content = old.read(name)
            if name == chosen:
                kind = rng.randrange(5)
                content = mutate_bytes(rng, content) if kind < 3 else content
                name = name.replace("0", "1") if kind == 3 else name
                if kind == 4:
                    continue
            new.writestr(name, content, zipfile.ZIP_STORED if rng.random() < 0.9 else zipfile.ZIP_DEFLATED)
    return out.getvalue()


def mutate_npy(rng: random.Random, data: bytes) -> bytes:
    """Changes the header of a NumPy array, or any bytes."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, data)
    length = struct.unpack("<H", data[8:10])[0]
    header = data[10 : 10 + length].rstrip()
    shape = str(tuple(rng.choice((0, 1, 2, 7, -1, 2**31, 2**40, 2**62)) for _ in range(rng.randrange(5))))
    changes = (
        (b"'<f4'", rng.choice((b"'|O'", b"'<f8'", b"'<U9'", b"'<c16'", b"[('a','<f4')]", b"'V8'", b"'x'"))),
        (header[header.index(b"(") : header.index(b")") + 1], shape.encode()),
        (b"False", rng.choice((b"True", b"None", b"__import__('os')"))),
    )
    header = header.replace(*rng.choice(changes))
    return data[:8] + struct.pack("<H", len(header) + 1) + header + b"\n" + data[10 + length :]


def mutate_tar(rng: random.Random, data: bytes) -> bytes:
    """Changes members of a tar, their names and sizes, or any bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data)
    out = io.BytesIO()
    form = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as old,
        tarfile.open(fileobj=out, mode="w", format=form) as new,
    ):
        members = old.getmembers()
        chosen = rng.choice(members).name
        for member in members:
            file = old.extractfile(member)
            content = file.read() if file else b""
            if member.name == chosen:
                kind = rng.randrange(6)
                names = (
                    "../../x.jpg",
                    "/etc/x.jpg",
                    "a" * 300,
                    "x\udcff.jpg",
                    "a/b.c.jpg",
                    ".jpg",
                    "x",
                    "é.txt",
                )
                member.name = rng.choice(names) if kind == 0 else member.name
                content = mutate_text(rng, content) if kind == 1 else content
                content = mutate_bytes(rng, content) if kind == 2 else content
                kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
                if kind == 3:
                    member.type, member.linkname, content = rng.choice(kinds), "/etc/passwd", b""
                member.mtime = rng.choice((-1, 2**40)) if kind == 4 else member.mtime
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    changed = bytearray(out.getvalue())
    if rng.random() < 0.3:  # the size that a header states, in octal, with its checksum right
        header = tarfile.TarInfo("a.jpg")
        header.size = rng.choice((2**20, 2**33, 2**62))
        changed[:512] = header.tobuf(tarfile.GNU_FORMAT)[:512]
    return bytes(changed)


def mutate_parquet(rng: random.Random, data: bytes) -> bytes:
    """Changes values, types and columns of a Parquet table, or any bytes of the file."""
    if rng.random() < 0.45:
        return mutate_bytes(rng, data)
    table = pq.read_table(io.BytesIO(data))
    rows, metadata = table.to_pylist(), table.schema.metadata
    kind, column = rng.randrange(5), rng.choice(table.schema.names)
    try:
        if kind == 0:
            table = table.drop_columns([column])
        elif kind == 1:
            other = pa.array([str(row[column]) for row in rows])
            table = table.set_column(table.schema.get_field_index(column), column, other)
        elif kind == 2:
            table = table.rename_columns([f"{n}x" if n == column else n for n in table.schema.names])
        else:
            for _ in range(rng.choice((1, 1, 3))):
                row = rng.choice(rows)
                held = row[column]
                odd = (None, float("nan"), float("inf"), -1, 0, 2**31 - 1, -(2**31), 1e30, "", "../x", "\0")
                if isinstance(held, list) and held and rng.random() < 0.8:
                    held[rng.randrange(len(held))] = rng.choice(odd)
                    held += [held[0]] * rng.choice((0, 0, 1))
                else:
                    row[column] = rng.choice(odd)
            table = pa.Table.from_pylist(rows, schema=table.schema)
    except (pa.ArrowException, TypeError, OverflowError, ValueError):
        return mutate_bytes(rng, data)
    if metadata and rng.random() < 0.3:
        table = table.replace_schema_metadata({key: mutate_text(rng, text) for key, text in metadata.items()})
    out = io.BytesIO()
    pq.write_table(table, out, compression=rng.choice(("none", "zstd", "snappy")))
    return out.getvalue()


FORMS: dict[str, Mutator] = {
    "bytes": mutate_bytes,
    "text": mutate_text,
    "json": mutate_json,
    "json lines": mutate_json_lines,
    "yaml": mutate_yaml,
    "csv": mutate_csv,
    "safetensors": mutate_safetensors,
    "zip": mutate_zip,
    "npy": mutate_npy,
    "tar": mutate_tar,
    "parquet": mutate_parquet,
}
