"""The optimizer classes: groups in, one step out. What a step computes is in `reference`, how it is kept in `state`."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from automagic_bnb import bnb, checkpoint, config, memory, metrics, paged, reference, requantization
from automagic_bnb import state as st
from automagic_bnb.fused import FusedStep
from automagic_bnb.notices import warn_once
from automagic_bnb.state import checked_gradient, local_tensor

logger = logging.getLogger("automagic_bnb")

LORA_NAME_PARTS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora_embedding", "lokr_", "hada_")
EMBEDDING_NAME_PARTS = ("embed", "emb.", "wte", "wpe")
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PEAK_TOLD = 4.0
"""A found rate may be doubled by hand, twice; beyond that the schedule was made for a given rate."""
FOREIGN_OVERRIDES = ("alpha", "t_alpha", "t_beta3", "max_unorm", "skip_zeros")
"""Keys that bitsandbytes' own optimizers read from an override and that say nothing to this one."""

Group = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known of a parameter for as long as it is optimized."""

    ordinal: int
    """Its place among all parameters: part of the key of its random bits."""
    is_lora: bool
    is_embedding: bool
    name: str
    probe_stride: int = st.PROBE_STRIDE
    """Of how many blocks auto_lr watches one, by the size of the parameter's group when it came."""

    def counts_as_lora(self, options: dict[str, Any]) -> bool:
        """Whether the parameter is treated as LoRA's: as its group says, else as its mark or name do."""
        return self.is_lora if options["lora"] is None else options["lora"]


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

    _class_options: ClassVar[dict[str, Any]] = {"optim_bits": 32}
    _fixed_options: tuple[str, ...] = ()
    """Those of the class options that the class's name promises."""

    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        named = options.get("profile") is not None  # then only what the class's name promises stands above it
        defaults = {k: v for k, v in self._class_options.items() if k in self._fixed_options or not named}
        self.config = config.make_config(**{**defaults, "lr": lr, **options})
        c = self.config
        for name in self._fixed_options:
            value, promised = getattr(c, name), self._class_options[name]
            if value != promised:
                raise ValueError(
                    f"option {name}={value!r}: {type(self).__name__} has {name}={promised!r} by its name; "
                    f"leave it out, set it to {promised!r} (in a config too), or use Automagic, which promises nothing"
                )
        if not bnb.BITSANDBYTES_AVAILABLE and c.optim_bits == 8:
            warn_once(bnb.MISSING_WARNING)
        self._facts: dict[Tensor, Facts] = {}
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        """Options of single parameters that `requantize` was given; they stand over `GlobalOptimManager`'s."""
        self._fused = FusedStep(self)
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
        self.state = defaultdict(st.WatchedState)
        self.defaults = {name: getattr(c, name) for name in config.GROUP_OPTIONS}
        self.non_castable_tensor_keys = set(st.TENSOR_KEYS)
        self._check_embeddings()
        self._log_plan()

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; any option of the optimizer may stand in it, other keys are kept untouched.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        count, defaults = len(self.param_groups), self.defaults
        group = self._with_options(dict(param_group), where=f" in parameter group {count}")
        # bitsandbytes' base constructor sets defaults of other optimizers (alpha, t_alpha); a group takes none of them.
        self.defaults = {}
        try:
            super().add_param_group(group)
            for p in self.param_groups[-1]["params"]:
                self._check_parameter(p)
        except (TypeError, ValueError):
            del self.param_groups[count:]
            raise
        finally:
            self.defaults = defaults
        self._index_parameters(count)

    def _with_options(self, group: Group, where: str) -> Group:
        """The group with every option checked and filled in from the config, and the rates resolved."""
        options = {name: getattr(self.config, name) for name in config.GROUP_OPTIONS}
        for name, value in group.items():
            if name in config.RULES:
                options[name] = config.check_parameter_option(name, value, where)
            elif meant := config.near_miss(name):
                warn_once(f"the key {name!r}{where} is no option and has no effect; did you mean {meant!r}?")
        if "lr" in group and "auto_lr" not in group and self.config.auto_lr is None:
            options["auto_lr"] = None  # a group with a rate of its own keeps it
        config.check_rates(options, where)
        if {"force_8bit", "factored"} & set(group):  # what a group has from the constructor it may make an exception of
            config.check_storage(options, where)
        config.resolve_rates(options)
        if not options["auto_lr"] and 0 < options["lr"] < options["min_lr"]:
            warn_once(
                f"option lr={options['lr']!r}{where}: lies below min_lr={options['min_lr']!r}, which raises it; "
                "pass a lower min_lr"
            )
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

    def _index_parameters(self, first: int = 0) -> None:
        """Note each parameter's ordinal, name and kind, from this group on; facts already known stay as they were."""
        known, self._facts = self._facts, self._facts if first else {}
        ordinal = sum(len(group["params"]) for group in self.param_groups[:first])
        for group in self.param_groups[first:]:
            names = group.get("param_names") or [""] * len(group["params"])
            stride = st.probe_stride(sum(local_tensor(p).numel() for p in group["params"] if not is_lazy(p)))
            for p, name in zip(group["params"], names, strict=True):
                marked = getattr(p, "_is_lora_layer", False) or any(part in name for part in LORA_NAME_PARTS)
                embedding = getattr(p, "_is_embedding", False) or any(x in name for x in EMBEDDING_NAME_PARTS)
                self._facts[p] = known.get(p, Facts(ordinal, bool(marked), bool(embedding), name, stride))
                ordinal += 1

    def _check_embeddings(self) -> None:
        """Warn where stable_emb was asked for and nothing tells which parameters are embeddings."""
        groups = [g for g in self.param_groups if g["stable_emb"] and g["optim_bits"] == 8]
        parameters = [p for g in groups for p in g["params"]]
        bnb.adopt_module_overrides({id(p) for p in parameters})
        told = any(
            self._facts[p].name or self._facts[p].is_embedding or bnb.overrides_of(p).get("optim_bits") == 32
            for p in parameters
        )
        if parameters and not told:
            warn_once(
                "stable_emb=True has no effect: no parameter can be told to be an embedding. Pass "
                "model.named_parameters() in place of model.parameters(), or set _is_embedding = True on the weights"
            )

    def facts_of(self, p: Tensor) -> Facts:
        if p not in self._facts:  # a wrapper has put another tensor into the group
            self._index_parameters()
        return self._facts[p]

    def effective_options(self, group: Group, p: Tensor) -> dict[str, Any]:
        """The options in force for one parameter: its group's, under its `GlobalOptimManager` override.

        Raises:
            TypeError, ValueError: the override holds an unknown option or an illegal value.
        """
        config.complete_betas(group)
        override = bnb.overrides_of(p)
        if self._overrides and p in self._overrides:
            override = {**override, **self._overrides[p]}
        if not override:
            return group
        where = " in a GlobalOptimManager override"
        ours = {name: value for name, value in override.items() if name not in FOREIGN_OVERRIDES}
        checked = {name: config.check_parameter_option(name, value, where) for name, value in ours.items()}
        options = {**group, **checked}
        if "lr" in checked:  # bitsandbytes' meaning: this rate, whatever the group's
            options["auto_lr"] = checked.get("auto_lr")
            unset = self.config.max_lr is config.DEFAULT_MAX_LR
            if unset and options["max_lr"] == max(config.DEFAULT_MAX_LR, 10 * group["base_lr"]):
                options["max_lr"] = config.DEFAULT_MAX_LR  # it follows this rate
        config.check_rates({**options, "lr": checked.get("lr")}, where)
        if checked.get("force_8bit"):
            config.check_storage(options, where)
        if "lr" in checked:
            config.resolve_rates(options)
            options["base_lr"] = options["initial_lr"] = options["lr"]
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
            storage = st.storage_of(local, options, self.facts_of(p).is_embedding)
        if self.is_paged and not paged.exists_on(local.device):
            warn_once("paged optimizer states exist on CUDA only; elsewhere they are ordinary memory")
        checkpoint.complete(self, p, state, storage, options)
        if (shard := checkpoint.shard_of(p)) is not None:
            state["shard"] = shard  # lets a checkpoint of another process's part be told

    def prepared_state(self, group: Group, p: Tensor, options: dict[str, Any]) -> st.State:
        """The state of one parameter, with all that these options need."""
        state, local = self.state[p], local_tensor(p)
        if not st.is_complete(state, local, options):
            self.init_state(group, p)
        if options is not group:  # an override may have come when the state was there already
            held, wanted = st.storage_held(state), st.storage_of(local, options, self.facts_of(p).is_embedding)
            if held != wanted:
                warn_once(
                    f"the state of a parameter of shape {tuple(p.shape)} is kept in {held}, its options say {wanted} "
                    "now; call optimizer.requantize() to convert it"
                )
        return state

    def requantize(
        self,
        parameters: Tensor | Iterable[Tensor] | None = None,
        *,
        optim_bits: int | None = None,
        min_8bit_size: int | None = None,
        factored: bool | None = None,
        force_8bit: bool | None = None,
        stable_emb: bool | None = None,
    ) -> None:
        """Change how states are stored, in the middle of a run: what they hold is converted, one parameter at a time.

        The options named replace those of the constructor and of all groups; overrides of single parameters stay in
        force over them. With no option, states are brought in line with the options as they are. After an error (out
        of memory) each parameter is wholly in its old or its new storage, and a further call goes on.

        Args:
            parameters: one or several parameters of this optimizer: the options then become its overrides of these
                only, over those of `GlobalOptimManager`; a checkpoint does not hold them. None: all.
            optim_bits, min_8bit_size, factored, force_8bit, stable_emb: as in the constructor; None: unchanged.

        Raises:
            TypeError, ValueError: an illegal value, or a tensor that is no parameter of this optimizer. Nothing has
                changed then.
        """
        requantization.requantize(
            self,
            parameters,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            factored=factored,
            force_8bit=force_8bit,
            stable_emb=stable_emb,
        )

    def _log_plan(self) -> None:
        if not self.config.verbose:
            return
        if not logger.handlers and not logging.getLogger().handlers:
            logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        for index, group in enumerate(self.param_groups):
            kinds: dict[str, int] = {}
            for p in group["params"]:
                facts = self.facts_of(p)
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
        tasks = []
        for group, p in self._fused.run():
            if p.grad is not None:
                tasks += self._update(group, p)
        self._fused.note_states()
        reference.shrink_ranks(tasks)
        return loss

    @torch.no_grad()
    def step_parameter(self, p: Tensor, group: Group, i: int | None = None) -> None:
        """Update one parameter, for a backward pass that steps as gradients arrive; equals `step()` over all."""
        self._adopt_overrides()
        if p.grad is not None and not self._fused.run_one(group, p):
            reference.shrink_ranks(self._update(group, p))

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

    def _update(self, group: Group, p: Tensor) -> list[reference.RankTask]:
        """The main update of one parameter in plain PyTorch; returns the low-rank step it is due, if any."""
        grad = checked_gradient(p)
        options, facts = self.effective_options(group, p), self.facts_of(p)
        state = self.prepared_state(group, p, options)
        theta = local_tensor(p).detach()
        if theta.numel() == 0:
            return []
        st.check_shape(state, theta)
        t, is_lora = state["step"] + 1, facts.counts_as_lora(options)
        st.set_uncounted(state, "step", t)
        scalars = reference.step_scalars(options, t, is_lora, facts.ordinal)
        d = self.found_rate(group, t, theta.device) if options["auto_lr"] else None
        flat = theta.contiguous()
        reference.update_parameter(flat, grad.contiguous(), state, options, scalars, d)
        if flat is not theta:
            theta.copy_(flat)
        is_lora = is_lora and not self.is_sharded(p)
        return reference.rank_tasks(theta, state, options, facts.ordinal, is_lora, d)

    @staticmethod
    def is_sharded(p: Tensor) -> bool:
        """Whether only a shard of the parameter lives here: its singular values are then not to be had."""
        if local_tensor(p).shape == p.shape:
            return False
        warn_once("parameters are sharded (DTensor): lora_rank_penalty does not apply to them")
        return True

    # --- the rate found -------------------------------------------------------------------------------------------

    def found_rate(self, group: Group, t: int, device: torch.device) -> Tensor:
        """d for step t of this group, brought up to date from the last step's sums when a new step begins."""
        d = self.rate_tensor(group, device)
        if self.begins_step(group, t):
            sums = [self.state[p]["tensor_stats"] for p in group["params"] if "probe_sum" in self.state.get(p, {})]
            reference.find_rate(d, [x.to(d.device) for x in sums], group["min_lr"], group["max_lr"])
            self.publish_rate(group)
        return d.to(device)

    @staticmethod
    def rate_tensor(group: Group, device: torch.device) -> Tensor:
        """d of a group, a 0-d float32 that lives in the group."""
        if "auto_lr_rate" not in group:
            group["auto_lr_rate"] = torch.tensor(group["base_lr"], dtype=torch.float32, device=device)
        return group["auto_lr_rate"]

    @staticmethod
    def begins_step(group: Group, t: int) -> bool:
        """Whether t is a step of the group that no parameter has reached before; notes it."""
        if t <= group.get("auto_lr_step", 0):  # missing where only an override switches auto_lr on
            return False
        group["auto_lr_step"] = t
        return True

    @staticmethod
    def publish_rate(group: Group) -> None:
        """Put the rate found where some trainers look for it, in place of `lr`; say if a schedule drives it far up."""
        relative = reference.relative_rate(group)
        group["effective_lr"] = group["auto_lr_rate"] * relative
        if relative > PEAK_TOLD:
            warn_once(
                f"a schedule has raised lr to more than {PEAK_TOLD:g} times its initial_lr, and with it the rate that "
                "is being found, above max_lr. OneCycleLR and CyclicLR begin far below their peak: give the optimizer "
                "an lr with them, or choose a schedule that begins at its peak"
            )

    def get_learning_rates(self) -> list[float | Tensor]:
        """Each group's learning rate: a float, or where it is being found a 0-d tensor (nothing synchronises).

        The mask is normalised to a mean of 1, so this is the mean over the elements but for those held at min_lr or
        max_lr; `element_learning_rates` has each one's.
        """
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

    def _get_lr(self, group: Group, state: st.State) -> Tensor:
        """The group's mean rate as a 0-d tensor on its parameters' device: the name that some trainers log from."""
        device = local_tensor(group["params"][0]).device if group["params"] else None
        rate = self._group_rate(group)
        if isinstance(rate, Tensor):
            return rate.to(device or rate.device)
        return torch.full((), rate, dtype=torch.float32, device=device)  # filled there: an upload would wait

    def element_learning_rates(self, p: Tensor) -> Tensor:
        """The rate of every element of p as the next step would use it, float32, shaped like p.

        Raises:
            KeyError: p has not been stepped by this optimizer.
        """
        state = self.state.get(p, {})
        if "state1" not in state:
            raise KeyError(f"a parameter of shape {tuple(p.shape)} has not been stepped by this optimizer")
        group = next(g for g in self.param_groups if any(q is p for q in g["params"]))
        options, local, facts = self.effective_options(group, p), local_tensor(p), self.facts_of(p)
        is_lora = facts.counts_as_lora(options)
        scalars = reference.step_scalars(options, state["step"] + 1, is_lora, facts.ordinal)
        blocks = reference.Blocks(local)
        k, _ = reference.read_mask(state, blocks)
        d = None
        if options["auto_lr"]:  # not found yet where it was switched on just now
            d = torch.as_tensor(group.get("auto_lr_rate", group["base_lr"]), device=local.device)
        rates = reference.element_rates(k, state["tensor_stats"][st.MASK_MEAN], scalars, d)
        return blocks.join(rates).view(local.shape)

    def get_metrics(self, per_group: bool = False, per_parameter: bool = False) -> dict[str, float]:
        """Learning rates, agreement, damping, clipping and the like: `metrics.METRICS` lists the names.

        Read-only, and the device is waited for once. Those that need gradients describe the step just taken, so call it
        between `step()` and `zero_grad()`; without gradients they are NaN. The set of names depends on the arguments
        and on the parameters only. Of a sharded parameter, the figures are those of the shard that lives here.

        Args:
            per_group: adds the same names after "group0/", "group1/" and so on.
            per_parameter: adds them after each parameter's name and a slash, or "group0/parameter0/" where it has none.
        """
        return metrics.collect(self, per_group, per_parameter)

    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """The bytes of state held, or to be allocated by the first step: `memory.efficiency_report` lists the figures.

        Available at any time, and nothing is allocated for it.
        """
        return memory.efficiency_report(self)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's form, one flat dict for each parameter, so that `torch.distributed.checkpoint` can flatten it.

        bitsandbytes nests the quantized tensors, so that FSDP1 does not gather them: done for its parameters only.
        """
        if any(getattr(p, "_fsdp_flattened", False) for p in self._facts):
            return super().state_dict()
        if any("shard" in state for state in self.state.values()):
            warn_once(checkpoint.SHARDED_WARNING)
        state_dict = torch.optim.Optimizer.state_dict(self)
        state_dict["state"] = {key: dict(state) for key, state in state_dict["state"].items()}
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` returned; every dtype comes back exactly.

        A key that an older checkpoint lacks starts at its first value. Checkpoints of bitsandbytes' Adam and AdamW, of
        ai-toolkit's Automagic and of Automagic_CameAMP load too: `migration` says what is taken over.

        Raises:
            ValueError: groups, shapes or keys do not fit. The optimizer is then as it was.
        """
        state_dict = dict(state_dict)  # hooks may write into it
        for hook in list(getattr(self, "_optimizer_load_state_dict_pre_hooks", {}).values()):
            state_dict = hook(self, state_dict) or state_dict
        state, groups = checkpoint.parse(self, state_dict)
        self.state.clear()
        self.state.update({p: st.WatchedState(values) for p, values in state.items()})
        self._fused.forget()
        for group, saved in zip(self.param_groups, groups, strict=True):
            for name in ("auto_lr_rate", "auto_lr_step", "effective_lr"):
                group.pop(name, None)  # of the run that ends here; a checkpoint from before the first step has none
            group.update(saved)
        for hook in list(getattr(self, "_optimizer_load_state_dict_post_hooks", {}).values()):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._adopt_overrides()
        parameters = [p for group in self.param_groups for p in group["params"]]
        return {
            **super().__getstate__(),
            "config": self.config,
            "is_paged": self.is_paged,
            "optimizer_name": self.optimizer_name,
            "args": getattr(self, "args", None),
            "facts": [self.facts_of(p) for p in parameters],
            # Both are told by the very parameter, of which a copy gets a copy.
            "overrides": [(bnb.overrides_of(p), self._overrides.get(p, {})) for p in parameters],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        facts, overrides = state.pop("facts", None), state.pop("overrides", None)
        super().__setstate__(state)
        if facts is None:
            return
        self.non_castable_tensor_keys = set(st.TENSOR_KEYS)
        self.name2qmap, self.initialized = {}, False
        self._fused = FusedStep(self)
        bnb.restore_managers(self)
        self.state = defaultdict(st.WatchedState, {p: st.WatchedState(held) for p, held in self.state.items()})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._facts = dict(zip(parameters, facts, strict=True))
        overrides = overrides or [({}, {})] * len(parameters)
        self._overrides = {p: dict(own) for p, (_, own) in zip(parameters, overrides, strict=True) if own}
        for p, (shared, _) in zip(parameters, overrides, strict=True):
            bnb.override(p, shared)
        for p, values in self.state.items():
            if "state1" not in values:
                continue
            st.link_code_books(values, local_tensor(p).device)
            if self.is_paged:  # a copy is in ordinary memory, for which there must be room
                for name in st.ELEMENT_KEYS & values.keys():
                    values[name] = st.empty_element_state(local_tensor(p), values[name].dtype, True).copy_(values[name])


class Automagic8bit(Automagic):
    """`Automagic` with block-wise 8-bit states."""

    _class_options: ClassVar[dict[str, Any]] = {"optim_bits": 8}


class Automagic32bit(Automagic):
    """`Automagic` with 32-bit states."""

    _fixed_options = ("optim_bits",)


class PagedAutomagic8bit(Automagic):
    """`Automagic8bit` whose large states the driver may page out to the host."""

    _class_options: ClassVar[dict[str, Any]] = {"optim_bits": 8, "is_paged": True}
    _fixed_options = ("optim_bits", "is_paged")


class PagedAutomagic32bit(Automagic):
    """`Automagic32bit` whose large states the driver may page out to the host."""

    _class_options: ClassVar[dict[str, Any]] = {"optim_bits": 32, "is_paged": True}
    _fixed_options = ("optim_bits", "is_paged")


# Names that code written for the earlier versions of this optimizer imports.
Automagic_CameAMP_Improved_8Bit = Automagic8bit
Automagic_CameAMP_8Bit = Automagic8bit


def create_improved_8bit_optimizer(params: Iterable[Any], **options: Any) -> Automagic8bit:
    """`Automagic8bit(params, **options)`, under the name earlier code calls."""
    return Automagic8bit(params, **options)
