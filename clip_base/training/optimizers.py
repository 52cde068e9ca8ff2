"""The optimizers of the training loop, those that save memory included."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from clip_base.runtime import distributed
from clip_base.runtime.errors import InputError

OPTIMIZERS = ("adamw", "adamw_bf16", "adamw_8bit", "sgd")
ROUND_STOCHASTICALLY = ("adamw_bf16", "adamw_8bit")
"""Those that can train weights of bfloat16: plain rounding would lose most updates."""
_PRIME = 1_000_003


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of all groups; torchao's optimizers keep it as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def build_optimizer(
    task: nn.Module,
    kind: str,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Returns the optimizer over the task's trainable parameters; gains and biases are not decayed.

    Args:
        task: whose parameters are trained.
        kind: one of `OPTIMIZERS`.
        lr: learning rate.
        betas: Adam's decays; SGD takes the first as its momentum.
        eps: Adam's epsilon.
        weight_decay: of matrices.
        seed: of what stochastic rounding draws.

    Raises:
        InputError: every parameter is frozen, or the optimizer's package is missing.
    """
    trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise InputError("nothing to train: every parameter of the task is frozen")
    narrow = next((p.dtype for p in trainable if p.dtype != torch.float32), None)
    if narrow is not None and kind not in ROUND_STOCHASTICALLY:
        raise InputError(
            f"train.optimizer={kind} would lose most updates of weights of type {narrow}; use "
            f"{' or '.join(ROUND_STOCHASTICALLY)}, which round stochastically"
        )
    shards = any(distributed.is_shard(parameter) for parameter in trainable)
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if kind == "adamw_bf16":
        return AdamWBFloat16(groups, lr, betas, eps, seed)
    if kind == "adamw_8bit":
        if shards:
            raise InputError(
                "train.optimizer=adamw_8bit keeps statistics in blocks that checkpoints of fsdp cannot hold; "
                "use adamw_bf16, or train.parallel=ddp"
            )
        return _adamw_8bit(groups, lr, betas, eps)
    return torch.optim.SGD(groups, lr=lr, momentum=betas[0], fused=not shards)  # torch's takes no shards


def _adamw_8bit(
    groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """Returns torchao's AdamW, whose statistics have 8 bits a number and a scale per block of 256."""
    told = logging.getLogger("torch.utils._pytree")  # which comments on how torchao is written
    before = told.level
    told.setLevel(logging.ERROR)
    try:
        from torchao.optim import AdamW8bit  # noqa: PLC0415 (optional, and five seconds to import)
    except ImportError as error:
        raise InputError(
            f"train.optimizer=adamw_8bit needs torchao, which cannot be imported ({error}); "
            "pip install 'regionclip[optimizers]', or use adamw_bf16, which needs no package"
        ) from None
    finally:
        told.setLevel(before)

    class Eager(AdamW8bit):  # type: ignore[misc]
        """The same arithmetic; compiled where that pays, which takes minutes on a CPU."""

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> Any:
            """Makes a step."""
            if any(p.device.type == "cuda" for group in self.param_groups for p in group["params"]):
                return super().step(closure)
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return cast(torch.optim.Optimizer, Eager(groups, lr=lr, betas=betas, eps=eps, bf16_stochastic_round=True))


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Returns float32 values as bfloat16: up or down by chance, so that the mean over many is the value.

    Args:
        values: float32, finite, any shape.
        generator: draws, on the device of the values.
    """
    bits = values.contiguous().view(torch.int32)
    drawn = torch.randint(1 << 16, bits.shape, generator=generator, device=bits.device, dtype=torch.int32)
    # The lower 16 bits carry into the upper ones as often as their share says.
    return ((bits + drawn) & -0x10000).view(torch.float32).bfloat16()


class AdamWBFloat16(torch.optim.Optimizer):
    """AdamW whose statistics are bfloat16, and so are weights that are: both rounded stochastically.

    The memory recipe of arXiv 2103.00020, section 2.5. Rounding to nearest would leave the second moment as
    it is when it changes by less than 0.4 %, as it does with a decay of 0.999. A step is computed in float32.
    What rounding draws depends on the seed, the step and the parameter alone, so that processes with equal
    weights keep them equal, and a resumed run draws what an undisturbed one does.

    Args:
        groups: parameters, each with its `weight_decay`.
        lr: learning rate.
        betas: decays of the two moments.
        eps: added to the root of the second.
        seed: of what rounding draws.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Makes a step with the gradients that there are."""
        loss = None if closure is None else closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        weight, gradient = _local(parameter), _local(cast(Tensor, parameter.grad)).float()
        generator = torch.Generator(weight.device)
        generator.manual_seed(((self.seed * _PRIME + state["step"]) * _PRIME + place) % (1 << 63))
        (first, second), step = group["betas"], state["step"]
        mean = _local(state["exp_avg"]).float().lerp_(gradient, 1 - first)
        square = _local(state["exp_avg_sq"]).float().lerp_(gradient.square(), 1 - second)
        _local(state["exp_avg"]).copy_(round_stochastically(mean, generator))
        _local(state["exp_avg_sq"]).copy_(round_stochastically(square, generator))
        root = square.sqrt_().div_((1 - second**step) ** 0.5).add_(group["eps"])
        value = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        value.addcdiv_(mean, root, value=-group["lr"] / (1 - first**step))
        weight.copy_(value if weight.dtype != torch.bfloat16 else round_stochastically(value, generator))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; torch makes the statistics as wide as the weights, which is undone."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].to(torch.bfloat16)


def _local(value: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, every other as it is."""
    return cast(Any, value).to_local() if distributed.is_shard(value) else value
