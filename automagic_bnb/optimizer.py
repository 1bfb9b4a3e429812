"""The optimizer classes: groups in, one step out. What a step computes is in `reference`, how it is kept in `state`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from automagic_bnb import (
    auto_lr,
    backends,
    checkpoint,
    estimate,
    fused,
    low_rank,
    memory,
    metrics,
    reference,
    requantization,
    sharded,
    sharded_step,
    signature,
)
from automagic_bnb import state as st
from automagic_bnb.cpu import step as cpu
from automagic_bnb.fused import FusedStep
from automagic_bnb.groups import Facts, Group, ParameterGroups  # noqa: F401 (pickles of earlier versions name Facts here)
from automagic_bnb.notices import warn_once
from automagic_bnb.run_log import StepLog
from automagic_bnb.scalars import step_scalars
from automagic_bnb.state import local_tensor
from automagic_bnb.stored import Blocks, read_mask
from automagic_bnb.uncompiled import uncompiled


class Automagic(ParameterGroups):
    """Automagic with CAME's confidence, torque-aware momentum and spatial penalties, 32-bit state by default.

    Each element's rate, but for LoRA's, adapts to how often its gradient keeps its sign; block-wise statistics on
    bitsandbytes' grid of 256 elements clip, damp and weigh the update. With no `lr` the rate is found.

    Args:
        params: parameters, named parameters, or groups, as for any torch optimizer; float32, bfloat16 or float16.
        lr: the mean learning rate. None: found during training (`auto_lr`); group["lr"] then says 1e-3 until a rate has
            been found, and shows that as long as no scheduler drives the group. With `auto_lr=True` from 0.01 on a
            factor of the rate found, below it where the search starts.
        options: any field of `AutomagicConfig`, which lists them with their defaults. All but `backend`, `is_paged`,
            `preset`, `profile`, `run_log`, `run_log_every` and `verbose` may also stand in a parameter group or in a
            `GlobalOptimManager` override.

    Raises:
        TypeError: an unknown option (naming the nearest), a value of the wrong type, a parameter of another dtype.
        ValueError: a value outside its range.

    Example:
        >>> model = torch.nn.Linear(512, 512)
        >>> optimizer = Automagic8bit(model.parameters(), lr=1e-4, weight_decay=0.01)
    """

    _counted = (0, 0)
    """The number of parameters, and of their elements."""
    _step_log: StepLog | None = None
    """What the option `run_log` writes."""

    def __init__(self, params: Iterable[Any], lr: float | None = None, **options: Any) -> None:
        self._fused = FusedStep(self)
        super().__init__(params, lr, **options)
        self._step_supports_amp_scaling = self.config.capturable
        """torch's GradScaler then hands over `grad_scale` and `found_inf`."""
        if self.config.run_log is not None:
            self._step_log = StepLog(self.config.run_log, self.config.run_log_every)
        if self.config.verbose:
            self.log_plan()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__init__.__code__ is Automagic.__init__.__code__:  # not one with arguments of its own
            cls.__init__ = signature.explicit(cls.__init__, cls._class_options)

    def requantize(
        self,
        parameters: Tensor | Iterable[Tensor] | None = None,
        *,
        optim_bits: int | None = None,
        min_8bit_size: int | None = None,
        factored: bool | None = None,
        mask_bits: int | None = None,
        mean_bits: int | None = None,
        force_8bit: bool | None = None,
        stable_emb: bool | None = None,
    ) -> None:
        """Change how states are stored, in the middle of a run: what they hold is converted, one parameter at a time.

        The options named replace those of the constructor and of all groups; overrides of single parameters stay in
        force over them. With no option, states are brought in line with the options as they are. After an error (out
        of memory) each parameter is wholly in its old or its new storage, and a further call goes on. With parameters
        under `fully_shard`, all processes have to call.

        Args:
            parameters: one or several parameters of this optimizer: the options then become its overrides of these
                only, over those of `GlobalOptimManager`; a checkpoint does not hold them. None: all.
            optim_bits, min_8bit_size, factored, mask_bits, mean_bits, force_8bit, stable_emb: as in the constructor;
                None: unchanged.

        Raises:
            TypeError, ValueError: an illegal value, or a tensor that is no parameter of this optimizer. Nothing has
                changed then.
        """
        self._fused.forget()  # the plan holds on to every tensor that is about to be replaced
        requantization.requantize(
            self,
            parameters,
            optim_bits=optim_bits,
            min_8bit_size=min_8bit_size,
            factored=factored,
            mask_bits=mask_bits,
            mean_bits=mean_bits,
            force_8bit=force_8bit,
            stable_emb=stable_emb,
        )

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        super().name_parameters(named)
        self._fused.forget()  # the plan rests on what is known of parameters

    # --- stepping -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: a CUDA graph is being captured, without `capturable`; or, with it, before any other step.
        """
        return self._step(closure)

    @uncompiled
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if torch.is_inference_mode_enabled():  # states made in it could not be changed outside
            with torch.inference_mode(False), torch.no_grad():
                return self._step(closure)
        fused.check_capture(self.param_groups)
        scaler = fused.Scaler.of(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all(scaler)
        return loss

    @st.unseen
    def _update_all(self, scaler: fused.Scaler) -> None:
        self.adopt_overrides()
        if self._unsaid:
            self.say_all_idle()
        tasks, shards = [], []
        for group, p in self._fused.run(scaler):
            if p.grad is not None and sharded.shard_of(p) is not None:
                shards.append((group, p))
            elif p.grad is not None:
                tasks += self._update(group, p, scaler.grad_scale)
        if shards:
            tasks += self._step_shards(shards, scaler.grad_scale)
        self._fused.note_states()
        low_rank.shrink_ranks(tasks)
        if self._step_log is not None:
            self._step_log.stepped(self._steps_taken, self.get_metrics)

    def step_parameter(self, p: Tensor, group: Group, i: int | None = None) -> None:
        """Update one parameter, for a backward pass that steps as gradients arrive; equals `step()` over all.

        Args:
            group: whose options count. One that the parameter is not in (some trainers pass the last group for all) is
                put right.

        Raises:
            KeyError: the parameter is in no group.
        """
        if torch.is_grad_enabled():  # it is not in a backward pass, where this is called a thousand times
            with torch.no_grad():
                self._step_parameter(p, group)
        else:
            self._step_parameter(p, group)

    @uncompiled
    @st.unseen
    def _step_parameter(self, p: Tensor, group: Group) -> None:
        fused.check_capture(self.param_groups)
        self.adopt_overrides()
        if self._unsaid:
            self.say_all_idle()
        if (owner := self.group_of(p)) is not group and not any(q is p for q in group["params"]):
            group = owner
        if self._step_log is not None and p.grad is not None:
            self._step_log.stepped_one(p, self._steps_taken, self.get_metrics)
        if p.grad is None or self._fused.run_one(group, p):
            return
        is_shard = sharded.shard_of(p) is not None
        low_rank.shrink_ranks(self._step_shards([(group, p)], None) if is_shard else self._update(group, p))

    def _step_shards(self, shards: list[tuple[Group, Tensor]], grad_scale: Tensor | None) -> list[low_rank.RankTask]:
        return sharded_step.step(self, shards, grad_scale, self._fused.shards, backends.takes)

    def update_step(self, group: Group, p: Tensor, gindex: int, pindex: int) -> None:
        """bitsandbytes' name for `step_parameter`."""
        self.step_parameter(p, group, pindex)

    @staticmethod
    def supports_fused_back_pass() -> bool:
        return True

    def _update(self, group: Group, p: Tensor, grad_scale: Tensor | None = None) -> list[low_rank.RankTask]:
        """The main update of one parameter outside the kernels; returns the low-rank step it is due, if any.

        grad_scale: float32 with one element, over which the gradient is to be taken.
        """
        grad = st.checked_gradient(p)
        if grad_scale is not None:
            grad = grad.float() * grad_scale.to(grad.device).reciprocal()
        options, facts = self.effective_options(group, p), self.facts_of(p)
        state = self.prepared_state(group, p, options)
        theta = local_tensor(p).detach()
        if theta.numel() == 0:
            return []
        st.check_shape(state, theta)
        t, is_lora = state["step"] + 1, facts.counts_as_lora(options)
        st.set_uncounted(state, "step", t)
        scalars = step_scalars(options, t, is_lora, facts.random_key(options))
        d, watch = None, None
        if options["auto_lr"]:
            d = auto_lr.rate_tensor(group, theta.device).to(theta.device)
            watch = functools.partial(estimate.watch, state=state)
        flat = theta.contiguous()
        compiled = cpu.takes(flat, self.config.backend, t, self._elements)
        update = cpu.update_parameter if compiled else reference.update_parameter
        update(flat, grad.contiguous(), state, options, scalars, d, watch)
        if flat is not theta:
            theta.copy_(flat)
        is_lora = is_lora and not self.is_sharded(p)
        return low_rank.rank_tasks(theta, state, options, facts.random_key(options), is_lora, d)

    def _elements(self) -> int:
        """Of all parameters; counted anew as some come."""
        if self._counted[0] != len(self._facts):
            self._counted = len(self._facts), sum(p.numel() for group in self.param_groups for p in group["params"])
        return self._counted[1]

    @staticmethod
    def is_sharded(p: Tensor) -> bool:
        """Whether only a shard of the parameter lives here: its singular values are then not to be had."""
        if local_tensor(p).shape == p.shape:
            return False
        warn_once(
            "a parameter is sharded otherwise than by rows (tensor parallel): lora_rank_penalty does not apply to it"
        )
        return True

    def get_learning_rates(self) -> list[float | Tensor]:
        """Each group's learning rate: a float, or where it is being found a 0-d tensor (nothing synchronises).

        The mask is normalised to a mean of 1, so this is the mean over the elements but for those held at min_lr or
        max_lr; `element_learning_rates` has each one's.
        """
        return [auto_lr.mean_rate(group) for group in self.param_groups]

    def get_avg_learning_rate(self) -> float | Tensor:
        """The mean of `get_learning_rates`, weighted by the groups' elements."""
        sizes = [sum(p.numel() for p in g["params"]) for g in self.param_groups]
        rates = self.get_learning_rates()
        homes = [rate.device for rate in rates if isinstance(rate, Tensor)]  # each is where its group is
        rates = [rate.to(homes[0], non_blocking=True) if isinstance(rate, Tensor) else rate for rate in rates]
        return sum(rate * size for rate, size in zip(rates, sizes, strict=True)) / max(sum(sizes), 1)

    def _get_lr(self, group: Group, state: st.State) -> Tensor:
        """The group's mean rate as a 0-d tensor on its parameters' device: the name that some trainers log from."""
        device = local_tensor(group["params"][0]).device if group["params"] else None
        rate = auto_lr.mean_rate(group)
        if isinstance(rate, Tensor):
            return rate.to(device or rate.device)
        return torch.full((), rate, dtype=torch.float32, device=device)  # filled there: an upload would wait

    @st.unseen
    def element_learning_rates(self, p: Tensor) -> Tensor:
        """The rate of every element of p as the next step would use it, float32, shaped like p; of a sharded parameter,
        of the rows that live here.

        Raises:
            KeyError: p has not been stepped by this optimizer.
        """
        self._fused.settle()
        state = self.state.get(p, {})
        if "state1" not in state:
            raise KeyError(f"a parameter of shape {tuple(p.shape)} has not been stepped by this optimizer")
        group = self.group_of(p)
        options, facts, shard = self.effective_options(group, p), self.facts_of(p), sharded.shard_of(p)
        local, is_lora = sharded.stepped(p), facts.counts_as_lora(options)
        scalars = step_scalars(options, state["step"] + 1, is_lora, facts.random_key(options))
        blocks = Blocks(local)
        k, _ = read_mask(state, blocks)
        d = None
        if options["auto_lr"]:  # not found yet where it was switched on just now
            d = torch.as_tensor(group.get("auto_lr_rate", auto_lr.start_rate(group)), device=local.device)
        rates = reference.element_rates(k, state["tensor_stats"][st.MASK_MEAN], scalars, d)
        shaped = blocks.join(rates).view(local.shape)
        return shaped if shard is None else shaped[shard.inside]

    @st.unseen
    def get_metrics(self, per_group: bool = False, per_parameter: bool = False) -> dict[str, float]:
        """Learning rates, agreement, damping, clipping and the like: `metrics.METRICS` lists the names.

        Read-only, and the device is waited for once. Those that need gradients describe the step just taken, so call it
        between `step()` and `zero_grad()`; without gradients they are NaN. The set of names depends on the arguments
        and on the parameters only. Of a sharded parameter, the figures are those of the shard that lives here.

        Args:
            per_group: adds the same names after "group0/", "group1/" and so on.
            per_parameter: adds them after each parameter's name and a slash, or "group0/parameter0/" where it has none.
        """
        self._fused.settle()
        return metrics.collect(self, per_group, per_parameter)

    @st.unseen
    def _steps_taken(self) -> int:
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)

    @st.unseen
    def get_memory_efficiency_report(self) -> dict[str, Any]:
        """The bytes of state held, or to be allocated by the first step: `memory.efficiency_report` lists the figures.

        Available at any time, and nothing is allocated for it.
        """
        return memory.efficiency_report(self)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's form, one flat dict for each parameter, so that `torch.distributed.checkpoint` can flatten it.

        bitsandbytes nests the quantized tensors, so that FSDP1 does not gather them: done for its parameters only.
        The state of parameters sharded by rows (`fully_shard`) comes as DTensors; all processes have to call then.
        """
        self._fused.settle()
        if any(getattr(p, "_fsdp_flattened", False) for p in self._facts):
            return super().state_dict()
        if any("shard" in state for state in self.state.values() if isinstance(state, dict)):
            warn_once(checkpoint.SHARDED_WARNING)
        state_dict = torch.optim.Optimizer.state_dict(self)
        held = state_dict["state"].items()  # among them what wrappers keep there under names of their own
        state_dict["state"] = {key: dict(state) if isinstance(state, dict) else state for key, state in held}
        for key, shard in self._shards(state_dict["param_groups"]).items():
            state = state_dict["state"].get(key, {})
            if "state1" in state:
                state_dict["state"][key] = shard.saved(state, self.facts_of(shard.p).probe_stride)
        return state_dict

    def _shards(self, saved_groups: list[Group]) -> dict[Any, sharded.Shard]:
        """The parameters sharded by rows, by their keys in a checkpoint."""
        pairs = [
            (key, sharded.shard_of(p))
            for saved, group in zip(saved_groups, self.param_groups, strict=True)
            for key, p in zip(saved["params"], group["params"], strict=True)
        ]
        return {key: shard for key, shard in pairs if shard is not None}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Load what `state_dict` returned; every dtype comes back exactly.

        A key that an older checkpoint lacks starts at its first value. Whether a rate is given or found is as the
        constructor was told, whatever the checkpoint says. Checkpoints of other optimizers load too: `migration` says
        of which, and what is taken over. As in torch, the groups are new dictionaries.

        Args:
            move_to_device: False leaves the tensors of the states on the checkpoint's devices, as bitsandbytes does;
                they have to be moved before the next step.

        Raises:
            ValueError: groups, shapes or keys do not fit. The optimizer is then as it was.
        """
        state_dict = checkpoint.checked_form(state_dict)  # a copy: hooks may write into it
        for hook in list(getattr(self, "_optimizer_load_state_dict_pre_hooks", {}).values()):
            state_dict = hook(self, state_dict) or state_dict
        state, groups = checkpoint.parse(self, state_dict, move_to_device)
        self.state.clear()
        self.state.update(st.watched(state))
        self._fused.forget()
        if self._step_log is not None:
            self._step_log.begin_again()
        self.param_groups = [
            # What was found belongs to the run that ends here; a checkpoint from before the first step has none.
            {**{name: value for name, value in group.items() if name not in auto_lr.GROUP_KEYS}, **saved}
            for group, saved in zip(self.param_groups, self._keep_rate_tensors(groups), strict=True)
        ]
        for hook in list(getattr(self, "_optimizer_load_state_dict_post_hooks", {}).values()):
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._fused.settle()
        return super().__getstate__()

    def _keep_rate_tensors(self, saved: list[Group]) -> list[Group]:
        """The groups of a checkpoint; an `lr` that is a tensor here stays that very one, which schedulers know."""
        for group, new in zip(self.param_groups, saved, strict=True):
            if isinstance(group["lr"], Tensor) and "lr" in new:
                new["lr"] = group["lr"].fill_(new["lr"])
        return saved

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused = FusedStep(self)
        self._step_supports_amp_scaling = any(group.get("capturable") for group in self.param_groups)


Automagic.__init__ = signature.explicit(Automagic.__init__, Automagic._class_options)


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
