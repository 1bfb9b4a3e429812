"""What `test_sharded` starts: OUT, and `test_sharded_kernels`: OUT triton.

Forks two processes connected by gloo, then four, each on the same gradients. What one process comes to is in
OUT/whole.pt, what each of several has seen in OUT/WORLD_RANK.pt. The imports are made once, before the forks.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from compatibility_cases import fit, network
from torch import Tensor, nn
from torch.distributed.checkpoint import load, save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from automagic_bnb import Automagic8bit, sharded_kernels

SHAPES = {
    "aligned": (256, 256),
    "embed": (37, 100),
    "bias": (300,),
    "conv": (6, 3, 5, 5),
    "few_rows": (3, 700),
    "lora_A": (8, 512),
    "lora_B": (512, 8),
    "probed": (500, 40),
}
"""Whole tiles to each process, rows that end within a block, processes without rows, LoRA, spans of several."""
BITS: dict[str, dict[str, Any]] = {
    "32 bits": {"optim_bits": 32},
    "codes": {"factored": False, "min_8bit_size": 0},
    "factored": {"min_8bit_size": 0, "mask_bits": 4, "mean_bits": 16},
    "bfloat16": {"dtype": torch.bfloat16, "master": "ecc8", "lora": True, "rank_penalty_strength": 5.0},
}
"""All parts but the mask's mean, a sum over the whole tensor: the same bits."""
SUMS: dict[str, dict[str, Any]] = {
    "mask": {"warmup_steps": 500},
    "norms": {"percentile_clipping": 20, "min_8bit_size": 0},
    "found": {"lr": None, "warmup_steps": 500, "optim_bits": 32},
}
"""Sums of shares: equal to rounding."""
SMALL = {
    "aligned": (64, 64),
    "embed": (37, 20),
    "bias": (300,),
    "conv": (6, 3, 3, 3),
    "few_rows": (3, 300),
    "lora_A": (8, 64),
    "lora_B": (64, 8),
    "probed": (70, 16),
}
"""The same for the kernels, which are interpreted."""
KERNELS: dict[str, dict[str, Any]] = {
    name: {"backend": "triton", "steps": 4, "shapes": SMALL, **options}
    for name, options in {
        "32 bits": BITS["32 bits"],
        "factored": BITS["factored"],
        "bfloat16": BITS["bfloat16"],
        "sums": {"lr": None, "warmup_steps": 500, "percentile_clipping": 20, "min_8bit_size": 0},
    }.items()
}
KERNELS_OF_FOUR = ("factored", "sums")
OF_FOUR = ("32 bits", "factored", "bfloat16", "norms", "found")
"""What four processes run, too; two run all."""
STEPS = 12


class Net(nn.Module):
    """The same weights in every process."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            p = torch.randn(shape, generator=generator) * 0.1
            self.register_parameter(name, nn.Parameter(p.to(dtype)))


def gradient(p: Tensor, index: int, step: int) -> Tensor:
    """With a constant part that a found rate follows, and elements that are skipped beside a shard's edge."""
    noise, drift = (
        torch.randn(p.shape, generator=torch.Generator().manual_seed(s)) for s in (97 * step + index, index)
    )
    g = (noise + 2 * drift) * 0.01
    if step % 3 == 1 and g.dim() == 2:
        edge = -(-g.shape[0] // 2)
        g[edge - 1 : edge + 1, ::7] = float("nan")
    if index == 7 and step < 4:
        g[: 7 * (4 - step)] = 0  # rows that are not in use at first: auto_lr watches others
    return g.to(p.dtype)


def train(model: nn.Module, opt: Any, steps: range, one_by_one: bool = False) -> None:
    """On gradients that are the same in all processes, laid out as the parameters are."""
    for step in steps:
        for index, p in enumerate(model.parameters()):
            whole = gradient(torch.empty(p.shape, dtype=p.dtype), index, step)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if hasattr(p, "device_mesh") else whole
        if one_by_one:
            for p in model.parameters():
                opt.step_parameter(p, opt.param_groups[0])
        else:
            opt.step()


def made(options: dict[str, Any], mesh: DeviceMesh | None) -> tuple[nn.Module, Automagic8bit]:
    options = {"lr": 1e-3, "warmup_steps": 0, "backend": "torch", **options}  # as shards step
    model = Net(options.pop("dtype", torch.float32), options.pop("shapes", SHAPES))
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    return model, Automagic8bit(model.named_parameters(), **options)


def trained(options: dict[str, Any], mesh: DeviceMesh | None, **how: Any) -> tuple[nn.Module, Automagic8bit]:
    options = dict(options)
    steps = options.pop("steps", STEPS)
    model, opt = made(options, mesh)
    train(model, opt, range(steps), **how)
    return model, opt


def weights(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor().detach() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def contents(model: nn.Module, opt: Automagic8bit) -> dict[str, Any]:
    """Weights and whole states, by names."""
    saved = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    return copy.deepcopy({"weights": dict(zip(SHAPES, weights(model), strict=True)), "state": saved["state"]})


def in_parts(options: dict[str, Any], rank: int, world: int) -> list[Tensor]:
    """The negative control: each process steps its rows as parameters of their own."""
    model, opt = made(options, None)
    for p in model.parameters():
        p.data = p.data.chunk(world)[rank].clone() if rank < len(p.data.chunk(world)) else p.data[:0].clone()
    rows = [[len(c) for c in torch.empty(shape).chunk(world)] for shape in SHAPES.values()]
    for step in range(STEPS):
        for index, (p, shape) in enumerate(zip(model.parameters(), SHAPES.values(), strict=True)):
            begin = sum(rows[index][:rank])
            p.grad = gradient(torch.empty(shape, dtype=p.dtype), index, step)[begin : begin + len(p)].clone()
        opt.step()
    return [p.detach() for p in model.parameters()]


def fitted(mesh: DeviceMesh | None) -> list[Any]:
    """The losses and weights of a network whose gradients come from its backward pass, a batch alike everywhere."""
    model = network()
    if mesh is not None:
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    return [
        fit(model, Automagic8bit(model.named_parameters(), lr=3e-3, mask_bits=8, backend="torch"), range(12)),
        weights(model),
    ]


# --- what is counted --------------------------------------------------------------------------------------------------


def collectives(mesh: DeviceMesh) -> dict[str, list[int]]:
    """How many each step takes: without parts that look beyond a shard, by default, and with the tenth step of LoRA."""
    counted = 0
    names = ("all_to_all_single", "all_gather_single", "all_gather_into_tensor", "all_reduce")
    real = {name: getattr(dist, name) for name in names if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        setattr(dist, name, counting(name))
    found = {}
    whole = {"edge_suppression": False, "frequency_penalty": 0.0, "lora": False}
    for name, options in {"apart": whole, "default": {"lora": False}, "lora": {"lora": True}}.items():
        model = nn.Module()
        model.p = nn.Parameter(torch.ones(512, 256))
        model.q = nn.Parameter(torch.ones(512, 256))
        opt = Automagic8bit(fully_shard(model, mesh=mesh).parameters(), lr=None, **options)
        found[name] = []
        for _ in range(10):
            before = counted
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            opt.step()
            found[name].append(counted - before)
    plain = nn.Parameter(torch.ones(512, 256))
    opt, before = Automagic8bit([plain], lr=None), counted
    plain.grad = torch.ones_like(plain)
    opt.step()
    found["unsharded"] = [counted - before]
    for name, call in real.items():
        setattr(dist, name, call)
    return found


# --- checkpoints ------------------------------------------------------------------------------------------------------

RESUMED: dict[str, Any] = {"min_8bit_size": 0, "mask_bits": 4, "auto_lr": True, "lr": 5e-3}


def saved_and_resumed(mesh: DeviceMesh, out: Path) -> dict[str, Any]:
    """Through one whole checkpoint and through torch.distributed.checkpoint, into fresh models of the same mesh."""
    model, opt = saved_run(mesh, out)
    full = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True))
    own = out.parent / f"own{dist.get_rank()}.pt"
    torch.save(opt.state_dict(), own)
    states, fresh = {"saved": weights(model)}, {}
    for way in ("full", "dcp", "own"):
        other, other_opt = made(RESUMED, mesh)
        if way == "dcp":
            load_dcp(other, other_opt, out)
        else:
            set_model_state_dict(other, get_model_state_dict(model))
        if way == "full":
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(other, other_opt, full, options=options)
        elif way == "own":
            other_opt.load_state_dict(torch.load(own, weights_only=True))
        fresh[way] = (other, other_opt)
    for m, o in ((model, opt), *fresh.values()):
        train(m, o, range(STEPS, STEPS + 3))
    return states | {"straight on": weights(model)} | {way: weights(m) for way, (m, _) in fresh.items()}


def saved_run(mesh: DeviceMesh | None, path: Path) -> tuple[nn.Module, Automagic8bit]:
    model, opt = trained(RESUMED, mesh)
    save({"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}, checkpoint_id=path)
    return model, opt


def saved_by_one(path: Path) -> dict[str, Any]:
    model, opt = saved_run(None, path)
    saved = copy.deepcopy(weights(model))
    train(model, opt, range(STEPS, STEPS + 3))
    return {"saved": saved, "straight on": weights(model)}


def load_dcp(model: nn.Module, opt: Automagic8bit, path: Path) -> None:
    target = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, opt)}
    load(target, checkpoint_id=path)
    set_model_state_dict(model, target["model"])
    set_optimizer_state_dict(model, opt, target["optimizer"])


def resumed_from(others: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """What another number of processes has saved, gone on with here."""
    model, opt = made(RESUMED, mesh)
    load_dcp(model, opt, others)
    loaded = contents(model, opt)
    train(model, opt, range(STEPS, STEPS + 3))
    return {"loaded": loaded, "after": weights(model)}


# --- what else there is of a shard ------------------------------------------------------------------------------------


def reports(mesh: DeviceMesh | None) -> dict[str, Any]:
    """Rates and metrics, the memory planned and held, and a change of storage under way."""
    model, opt = made({"warmup_steps": 500, "min_8bit_size": 0}, mesh)
    planned = opt.get_memory_efficiency_report()
    train(model, opt, range(STEPS))
    held = opt.get_memory_efficiency_report()
    rates = [opt.element_learning_rates(p) for p in model.parameters()]
    metrics = opt.get_metrics()
    opt.requantize(optim_bits=32)
    opt.requantize(optim_bits=8, factored=False)
    train(model, opt, range(STEPS, STEPS + 3))
    after = contents(model, opt)
    return {"planned": planned, "held": held, "rates": rates, "metrics": metrics, "requantized": after}


def cut_by_columns(mesh: DeviceMesh, out: Path, rank: int, world: int) -> dict[str, Any]:
    """Stepped as parameters of their own, with a warning; saved by each process, and refused by another."""
    torch.manual_seed(0)
    p = nn.Parameter(distribute_tensor(torch.randn(64, 256), mesh, [Shard(1)]))
    opt = Automagic8bit([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step()
        torch.save(opt.state_dict(), out / f"cut{rank}.pt")
    dist.barrier()
    error = ""
    try:
        opt.load_state_dict(torch.load(out / f"cut{(rank + 1) % world}.pt", weights_only=True))
    except ValueError as e:
        error = str(e)
    return {"warnings": [str(w.message) for w in caught], "error": error}


def hybrid(world: int) -> dict[str, Any]:
    """Replicated over one dimension of the mesh, sharded over the other."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model, opt = trained(BITS["factored"], mesh)
    assert all(p.placements == (Replicate(), Shard(0)) for p in model.parameters())
    return contents(model, opt)


def by_kernels(rank: int, world: int, out: Path) -> None:
    """What the kernels come to, and how many shards they were launched for."""
    dist.init_process_group("gloo", init_method=f"file://{out / f'store{world}'}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    launched: list[int] = []
    launch = sharded_kernels.ShardLaunches.step

    def counting(launches: Any, dues: list[Any]) -> Any:
        launched.append(len(dues))
        return launch(launches, dues)

    sharded_kernels.ShardLaunches.step = counting  # type: ignore[method-assign]
    names = KERNELS if world == 2 else KERNELS_OF_FOUR
    seen: dict[str, Any] = {
        name: contents(*trained(KERNELS[name], mesh, one_by_one=name == "32 bits")) for name in names
    }
    torch.save({**seen, "launched": sum(launched)}, out / f"{world}_{rank}.pt")


def main(rank: int, world: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out / f'store{world}'}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    runs = {**BITS, **SUMS}
    seen: dict[str, Any] = {name: contents(*trained(runs[name], mesh)) for name in (runs if world == 2 else OF_FOUR)}
    seen["in parts"] = in_parts(BITS["32 bits"], rank, world)
    seen["fitted"] = fitted(mesh)
    if world == 2:
        seen["one by one"] = contents(*trained(BITS["32 bits"], mesh, one_by_one=True))
        seen["collectives"] = collectives(mesh)
    seen["resumed"] = saved_and_resumed(mesh, out / f"dcp{world}")
    seen["reports"] = reports(mesh)
    seen["columns"] = cut_by_columns(mesh, out, rank, world)
    seen["of 1"] = resumed_from(out / "dcp1", mesh)
    if world == 4:
        seen["hybrid"] = hybrid(world)
        seen["of 2"] = resumed_from(out / "dcp2", mesh)
    torch.save(seen, out / f"{world}_{rank}.pt")


def after_four(rank: int, world: int, out: Path) -> None:
    """Two go on with what four have saved."""
    dist.init_process_group("gloo", init_method=f"file://{out / 'store of fewer'}", rank=rank, world_size=world)
    seen = {"of 4": resumed_from(out / "dcp4", init_device_mesh("cpu", (world,)))}
    torch.save(seen, out / f"fewer_{rank}.pt")


def forked(world: int, out: Path, work: Callable[[int, int, Path], None] = main) -> None:
    """`work` in so many processes; raises SystemExit where one fails.

    None of them closes its connections while another may still read from it: what a collective has sent is not yet
    what has arrived.
    """
    assert not torch.cuda.is_available(), "a process with GPUs is not forked once autograd has begun"
    children, all_done = [], multiprocessing.get_context("fork").Barrier(world)
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                work(rank, world, out)
                all_done.wait(timeout=300)
                dist.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
                all_done.abort()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit(1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    if sys.argv[2:] == ["triton"]:
        torch.save({name: contents(*trained(options, None)) for name, options in KERNELS.items()}, folder / "whole.pt")
        for size in (2, 4):
            forked(size, folder, by_kernels)
        raise SystemExit
    alone: dict[str, Any] = {name: contents(*trained(options, None)) for name, options in {**BITS, **SUMS}.items()}
    alone["reports"], alone["fitted"] = reports(None), fitted(None)
    alone["resumed"] = saved_by_one(folder / "dcp1")
    for size in (2, 4):
        forked(size, folder)
        alone[f"of {size}"] = resumed_from(folder / f"dcp{size}", None)
    forked(2, folder, after_four)
    torch.save(alone, folder / "whole.pt")
