"""The optimizer classes: groups in, one step out. What a step computes is in `reference`, how it is kept in `state`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from automagic_bnb import bnb, checkpoint, config, reference
from automagic_bnb import state as st

logger = logging.getLogger("automagic_bnb")

LORA_NAME_PARTS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora_embedding", "lokr_", "hada_")
EMBEDDING_NAME_PARTS = ("embed", "emb.", "wte", "wpe")
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOREIGN_OVERRIDES = ("alpha", "t_alpha", "t_beta3", "max_unorm", "skip_zeros")
"""Keys that bitsandbytes' own optimizers read from an override and that say nothing to this one."""

Group = dict[str, Any]
_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=3)


@dataclass(frozen=True)
class Facts:
    """What is known of a parameter for as long as it is optimized."""

    ordinal: int
    """Its place among all parameters: part of the key of its random bits."""
    is_lora: bool
    is_embedding: bool
    name: str


def local_tensor(p: Tensor) -> Tensor:
    """The shard of a DTensor that lives here; any other tensor as it is."""
    return p.to_local() if hasattr(p, "to_local") else p  # type: ignore[attr-defined]


class Automagic(bnb.Optimizer2State):
    """Automagic with CAME's confidence, torque-aware momentum and spatial penalties, 32-bit state by default.

    Each element's rate adapts to how often its gradient keeps its sign; block-wise statistics on bitsandbytes' grid of
    256 elements clip, damp and weigh the update. With no `lr` the rate starts at 1e-6 and finds its own.

    Args:
        params: parameters, named parameters, or groups, as for any torch optimizer; float32, bfloat16 or float16.
        lr: the mean learning rate. None: found during training (`auto_lr`).
        options: any field of `AutomagicConfig`, which lists them with their defaults. All but `backend`, `is_paged`,
            `profile` and `verbose` may also stand in a parameter group or in a `GlobalOptimManager` override.

    Raises:
        TypeError: an unknown option (naming the nearest), a value of the wrong type, a parameter of another dtype.
        ValueError: a value outside its range.

    Example:
        >>> model = torch.nn.Linear(512, 512)
        >>> optimizer = Automagic8bit(model.parameters(), lr=1e-4, weight_decay=0.01)
    """

    _class_options: dict[str, Any] = {"optim_bits": 32}

    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        self.config = config.make_config(**{**self._class_options, "lr": lr, **options})
        c = self.config
        if not bnb.BITSANDBYTES_AVAILABLE:
            if c.force_8bit:
                raise ValueError(
                    f"option force_8bit=True: needs bitsandbytes, which failed to import ({bnb.IMPORT_ERROR})"
                )
            if c.optim_bits == 8:
                _warn_once(bnb.MISSING_WARNING)
        self._facts: dict[Tensor, Facts] = {}
        super().__init__(
            "automagic",
            params,
            lr=config.START_LR if c.lr is None else c.lr,
            betas=c.betas,
            eps=c.eps[0],
            weight_decay=c.weight_decay,
            optim_bits=c.optim_bits,
            min_8bit_size=c.min_8bit_size,
            is_paged=c.is_paged,
        )
        self.defaults = {name: getattr(c, name) for name in config.GROUP_OPTIONS}
        self.non_castable_tensor_keys = set(st.TENSOR_KEYS)
        self._log_plan()

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; any option of the optimizer may stand in it, other keys are kept untouched.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        group = self._with_options(dict(param_group), where=f" in parameter group {len(self.param_groups)}")
        # bitsandbytes' base constructor sets defaults of other optimizers (alpha, t_alpha); a group takes none of them.
        self.defaults = {}
        super().add_param_group(group)
        for p in self.param_groups[-1]["params"]:
            self._check_parameter(p)
        self._index_parameters()

    def _with_options(self, group: Group, where: str) -> Group:
        """The group with every option checked and filled in from the config, and the rates resolved."""
        options = {name: getattr(self.config, name) for name in config.GROUP_OPTIONS}
        for name in config.GROUP_OPTIONS:
            if name in group:
                options[name] = config.check_option(name, group[name], where)
        if "lr" in group and "auto_lr" not in group and self.config.auto_lr is None:
            options["auto_lr"] = None  # a group with a rate of its own keeps it
        config.check_rates(options, where)
        config.resolve_rates(options)
        group.update(options)
        group.setdefault("base_lr", options["lr"])
        if options["auto_lr"]:
            group.setdefault("auto_lr_step", 0)
        return group

    @staticmethod
    def _check_parameter(p: Tensor) -> None:
        if p.dtype not in PARAMETER_DTYPES:
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} has dtype {p.dtype}; "
                "supported are float32, bfloat16 and float16: convert it, or leave it out"
            )

    def _index_parameters(self) -> None:
        """Note each parameter's ordinal, name and kind; facts already known stay as they were."""
        known, self._facts = self._facts, {}
        ordinal = 0
        for group in self.param_groups:
            names = group.get("param_names") or [""] * len(group["params"])
            for p, name in zip(group["params"], names, strict=True):
                marked = getattr(p, "_is_lora_layer", False) or any(part in name for part in LORA_NAME_PARTS)
                embedding = getattr(p, "_is_embedding", False) or any(x in name for x in EMBEDDING_NAME_PARTS)
                self._facts[p] = known.get(p, Facts(ordinal, bool(marked), bool(embedding), name))
                ordinal += 1

    def _facts_of(self, p: Tensor) -> Facts:
        if p not in self._facts:  # a wrapper has put another tensor into the group
            self._index_parameters()
        return self._facts[p]

    def effective_options(self, group: Group, p: Tensor) -> dict[str, Any]:
        """The options in force for one parameter: its group's, under its `GlobalOptimManager` override.

        Raises:
            TypeError, ValueError: the override holds an unknown option or an illegal value.
        """
        override = bnb.overrides_of(p)
        if not override:
            return group
        checked = {k: config.check_option(k, v) for k, v in override.items() if k not in FOREIGN_OVERRIDES}
        options = {**group, **checked}
        if "lr" in checked:  # bitsandbytes' meaning: this rate, whatever the group's
            options.update(base_lr=checked["lr"], initial_lr=checked["lr"], auto_lr=checked.get("auto_lr", False))
        return options

    def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
        """bitsandbytes' name for `effective_options`."""
        return self.effective_options(group, self.param_groups[gindex]["params"][pindex])

    # --- state --------------------------------------------------------------------------------------------------

    def init_state(self, group: Group, p: Tensor, gindex: int = 0, pindex: int = 0) -> None:
        """Make the state of one parameter, or add what newly switched-on options need."""
        options = self.effective_options(group, p)
        state, local = self.state[p], local_tensor(p)
        if "state1" in state:
            storage = st.storage_held(state)
        else:
            storage = st.storage_of(local, options, self._facts_of(p).is_embedding)
        if self.is_paged and local.device.type == "cpu":
            _warn_once("paged optimizer states exist on CUDA only; on the CPU they are ordinary memory")
        st.complete(state, local, storage, options, self.is_paged)

    def _log_plan(self) -> None:
        if not self.config.verbose:
            return
        if not logger.handlers and not logging.getLogger().handlers:
            logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        for index, group in enumerate(self.param_groups):
            kinds: dict[str, int] = {}
            for p in group["params"]:
                facts = self._facts_of(p)
                kind = st.storage_of(local_tensor(p), self.effective_options(group, p), facts.is_embedding)
                kinds[kind] = kinds.get(kind, 0) + p.numel()
            rate = "found during training" if group["auto_lr"] else f"{group['lr']:g}"
            logger.info("group %d: lr %s; elements by storage: %s", index, rate, kinds)

    # --- stepping -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's result, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adopt_overrides()
        for gindex, group in enumerate(self.param_groups):
            ready = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
            shrinking = []
            for pindex, p in ready:
                shrinking += self._update(group, p, gindex, pindex)
            self._shrink_ranks(shrinking)
        return loss

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: Group, i: int | None = None) -> None:
        """Update one parameter, for a backward pass that steps as gradients arrive; equals `step()` over all."""
        self._adopt_overrides()
        if p.grad is not None:
            self._shrink_ranks(self._update(group, p))

    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """bitsandbytes' name for `step_parameter`."""
        self.step_parameter(p, group, pindex)

    @staticmethod
    def supports_fused_back_pass() -> bool:
        return True

    def _adopt_overrides(self) -> None:
        if not self.initialized:
            bnb.adopt_module_overrides({id(p) for p in self._facts})
            self.initialized = True

    def _update(self, group: Group, p: Tensor, gindex: int = 0, pindex: int = 0) -> list[RankTask]:
        """The main update of one parameter; returns the low-rank step it is due, if any."""
        grad = self._checked_gradient(p)
        options, facts = self.effective_options(group, p), self._facts_of(p)
        state = self.state[p]
        if not st.is_complete(state, options):
            self.init_state(group, p, gindex, pindex)
        theta = local_tensor(p).detach()
        if theta.numel() == 0:
            return []
        state["step"] += 1
        t = state["step"]
        is_lora = facts.is_lora if options["lora"] is None else options["lora"]
        factored = st.storage_held(state) == "factored"
        scalars = reference.step_scalars(options, t, is_lora, facts.ordinal, factored)
        d = self._found_rate(group, t, theta.device) if options["auto_lr"] else None
        flat = theta.contiguous()
        reference.update_parameter(flat, grad.contiguous(), state, options, scalars, d)
        if flat is not theta:
            theta.copy_(flat)
        if not reference.shrinks_rank(theta, t, is_lora, options):
            return []
        rate = scalars.rate if d is None else d * scalars.rate
        key = reference.rank_key(options, facts.ordinal, t)
        return [RankTask(theta, rate * reference.rank_strength(options), key, options["stochastic_rounding"])]

    def _checked_gradient(self, p: Tensor) -> Tensor:
        grad = local_tensor(p.grad)  # type: ignore[arg-type]
        if grad.is_sparse:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is sparse, which is not supported; "
                "build the embedding with sparse=False"
            )
        return grad

    @staticmethod
    def _shrink_ranks(tasks: list[RankTask]) -> None:
        """Step 9 for the tasks of a group, those of one shape together."""
        batches: dict[Any, list[RankTask]] = {}
        for task in tasks:
            key = (task.theta.shape, task.theta.dtype, task.theta.device, task.stochastic)
            batches.setdefault(key, []).append(task)
        for batch in batches.values():
            reference.shrink_rank(
                [t.theta for t in batch], [t.threshold for t in batch], [t.key for t in batch], batch[0].stochastic
            )

    # --- the rate found -------------------------------------------------------------------------------------------

    def _found_rate(self, group: Group, t: int, device: torch.device) -> Tensor:
        """d for step t of this group, brought up to date from the last step's sums when a new step begins."""
        d = group.get("auto_lr_rate")
        if d is None:
            d = group["auto_lr_rate"] = torch.tensor(group["base_lr"], dtype=torch.float32, device=device)
        if t > group["auto_lr_step"]:
            group["auto_lr_step"] = t
            sums = [self.state[p]["tensor_stats"] for p in group["params"] if "probe_sum" in self.state.get(p, {})]
            reference.find_rate(d, [x.to(d.device) for x in sums], group["min_lr"], group["max_lr"])
        return d.to(device)

    def get_learning_rates(self) -> list[float | Tensor]:
        """Each group's mean learning rate: a float, or where it is being found a 0-d tensor (nothing synchronises)."""
        return [self._group_rate(group) for group in self.param_groups]

    def get_avg_learning_rate(self) -> float | Tensor:
        """The mean of `get_learning_rates`, weighted by the groups' elements."""
        sizes = [sum(p.numel() for p in g["params"]) for g in self.param_groups]
        weighted = [rate * size for rate, size in zip(self.get_learning_rates(), sizes, strict=True)]
        return sum(weighted) / max(sum(sizes), 1)

    def _group_rate(self, group: Group) -> float | Tensor:
        if not group["auto_lr"] or "auto_lr_rate" not in group:
            return group["lr"]
        return group["auto_lr_rate"] * reference.relative_rate(group)

    def element_learning_rates(self, p: Tensor) -> Tensor:
        """The rate of every element of p as the next step would use it, float32, shaped like p.

        Raises:
            KeyError: p has not been stepped by this optimizer.
        """
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        options, state, local = self.effective_options(group, p), self.state[p], local_tensor(p)
        facts = self._facts_of(p)
        scalars = reference.step_scalars(options, state["step"] + 1, facts.is_lora, facts.ordinal, False)
        blocks = reference.Blocks(local)
        k, _ = reference.read_mask(state, blocks)
        d = group["auto_lr_rate"].to(local.device) if options["auto_lr"] else None
        rates = reference.element_rates(k, state["tensor_stats"][st.MASK_MEAN], scalars, d)
        return blocks.join(rates).view(local.shape)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` returned; every dtype comes back exactly.

        A key that an older checkpoint lacks starts at its first value. bitsandbytes' own two-state 8-bit and 32-bit
        checkpoints load too: `state1` and `state2` are taken over.

        Raises:
            ValueError: groups, shapes or keys do not fit. The optimizer is then as it was.
        """
        for hook in list(getattr(self, "_optimizer_load_state_dict_pre_hooks", {}).values()):
            state_dict = hook(self, state_dict) or state_dict
        state, groups = checkpoint.parse(self, state_dict)
        self.state.clear()
        self.state.update(state)
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update(saved)
        for hook in list(getattr(self, "_optimizer_load_state_dict_post_hooks", {}).values()):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "config": self.config,
            "is_paged": self.is_paged,
            "optimizer_name": self.optimizer_name,
            "args": getattr(self, "args", None),
            "facts": list(self._facts.values()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        facts = state.pop("facts", None)
        super().__setstate__(state)
        if facts is None:
            return
        self.non_castable_tensor_keys = set(st.TENSOR_KEYS)
        self.name2qmap, self.initialized = {}, False
        bnb.restore_managers(self)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._facts = dict(zip(parameters, facts, strict=True))
        for p, values in self.state.items():
            st.link_code_books(values, local_tensor(p).device)


@dataclass(frozen=True)
class RankTask:
    """One parameter whose singular values are to be lowered by `threshold`."""

    theta: Tensor
    threshold: float | Tensor
    key: int
    stochastic: bool


class Automagic8bit(Automagic):
    """`Automagic` with block-wise 8-bit states."""

    _class_options = {"optim_bits": 8}


class Automagic32bit(Automagic):
    """`Automagic` with 32-bit states."""


class PagedAutomagic8bit(Automagic):
    """`Automagic8bit` whose large states the driver may page out to the host."""

    _class_options = {"optim_bits": 8, "is_paged": True}


class PagedAutomagic32bit(Automagic):
    """`Automagic32bit` whose large states the driver may page out to the host."""

    _class_options = {"optim_bits": 32, "is_paged": True}


# Names that code written for the earlier versions of this optimizer imports.
Automagic_CameAMP_Improved_8Bit = Automagic8bit
Automagic_CameAMP_8Bit = Automagic8bit


def create_improved_8bit_optimizer(params: Iterable[Any], **options: Any) -> Automagic8bit:
    """`Automagic8bit(params, **options)`, under the name earlier code calls."""
    return Automagic8bit(params, **options)
