"""Parameter groups in, checked options out: what is known of each parameter, and its state made and completed.

The ground that the step, checkpoints, conversion and reports stand on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.torch_version import TorchVersion

from automagic_bnb import bnb, config, direction, idle, sharded
from automagic_bnb import quantization as q
from automagic_bnb import state as st
from automagic_bnb.notices import warn_once
from automagic_bnb.state import local_tensor

logger = logging.getLogger("automagic_bnb")

LORA_NAME_PARTS = ("lora_A", "lora_B", "lora_up", "lora_down", "lora_embedding", "lokr_", "hada_")
TORCH_TAKES_NAMES = TorchVersion(torch.__version__) >= "2.6"
EMBEDDING_NAME_PARTS = ("embed", "emb.", "wte", "wpe")
own_seeds: Iterator[int] = itertools.count()
"""What stands for a seed where none is given: the how many-th optimizer of this process it is. No random number, since
processes that train replicas must round alike whatever their generators hold: they make the same optimizers."""
FOREIGN_OVERRIDES = ("alpha", "t_alpha", "t_beta3", "max_unorm", "skip_zeros")
"""Keys that bitsandbytes' own optimizers read from an override and that say nothing to this one."""

Group = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What is known of a parameter for as long as it is optimized."""

    ordinal: int
    """Its place among all parameters."""
    is_lora: bool
    is_embedding: bool
    name: str
    probe_stride: int = st.PROBE_STRIDE
    """Of how many blocks auto_lr watches one, by the size of the parameter's group when it came."""

    def random_key(self, options: dict[str, Any]) -> int:
        """The key of its random bits under these options: of its seed and its name, which is the same in whatever
        optimizer the parameter is, alone or among others; without a name of its ordinal.

        Where no seed is given, the optimizer's own number stands for one, by which the first parameters of two
        optimizers differ; of parameters with names, 0.
        """
        seed = options["seed"]
        if not self.name:
            return q.parameter_key(options["own_seed"] if seed is None else seed, self.ordinal)
        named = int.from_bytes(hashlib.blake2b(self.name.encode(), digest_size=8).digest(), "big")
        return q.parameter_key(seed or 0, named)

    def counts_as_lora(self, options: dict[str, Any]) -> bool:
        """Whether the parameter is treated as LoRA's: as its group says, else as its mark or name do."""
        return self.is_lora if options["lora"] is None else options["lora"]


def with_names_apart(group: Group) -> Group:
    """A copy of a group in which pairs of name and parameter are apart, as torch has them from 2.6 on.

    Raises:
        ValueError: only some of the parameters have names.
    """
    group, params = dict(group), group["params"]
    if isinstance(params, (Tensor, set)):
        return group
    group["params"] = params = list(params)
    named = [isinstance(p, tuple) for p in params]
    if any(named) and not all(named):
        raise ValueError("all parameters of a group must come with names, or none of them")
    if any(named):
        group["param_names"], group["params"] = [name for name, _ in params], [p for _, p in params]
    return group


def is_lora_name(name: str) -> bool:
    return any(part in name for part in LORA_NAME_PARTS)


def is_embedding_name(name: str) -> bool:
    return any(part in name for part in EMBEDDING_NAME_PARTS)


def are_low_rank_pairs(parameters: list[Tensor]) -> bool:
    """Whether matrices come as LoRA's do: in twos that multiply to one, of a rank well below its sides."""
    matrices = [p for p in parameters if p.dim() >= 2 and p.numel() > 0]
    twos = list(zip(matrices[::2], matrices[1::2], strict=False))
    return bool(twos) and 2 * len(twos) == len(matrices) and all(_make_a_product(*two) for two in twos)


def _make_a_product(down: Tensor, up: Tensor) -> bool:
    """Of rank × inputs and outputs × rank; of a convolution the kernel is the first's."""
    rank = down.shape[0]
    return rank == up.shape[1] and 2 * rank <= min(down.numel() // rank, up.shape[0])


class ParameterGroups(bnb.Optimizer2State):
    """bitsandbytes' base class with this optimizer's options in its groups; it cannot step."""

    _class_options: ClassVar[dict[str, Any]] = {"optim_bits": 32}
    _fixed_options: tuple[str, ...] = ()
    """Those of the class options that the class's name promises."""
    _lr: Tensor | None = None
    """The constructor's lr where it is a tensor."""
    _own_seed = 0
    """What stands for a seed where none is given; groups hold it, and checkpoints with them."""
    _unsaid: list[tuple[dict[str, Any], int | None]]
    """The options given for a group, by its number, or for all (None), of which it has not been said yet what comes to
    nothing."""

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
        self._lr = lr if isinstance(lr, Tensor) else None
        self._own_seed = next(own_seeds)
        self._facts: dict[Tensor, Facts] = {}
        self._owners: tuple[int, dict[Tensor, tuple[int, Group]]] = (0, {})
        """How many groups there are, and by parameter the number of the one that it is in, and this."""
        self._unsaid = []
        self._overrides: dict[Tensor, dict[str, Any]] = {}
        """Options of single parameters that `requantize` was given; they stand over `GlobalOptimManager`'s."""
        super().__init__(
            "automagic",
            params,
            lr=config.NOMINAL_LR if c.lr is None else c.lr,
            betas=c.betas,
            eps=c.eps[0],
            weight_decay=c.weight_decay,
            optim_bits=c.optim_bits,
            min_8bit_size=c.min_8bit_size,
            is_paged=c.is_paged,
        )
        self.state = defaultdict(st.WatchedState)
        self.defaults = {name: getattr(c, name) for name in config.GROUP_OPTIONS}
        if c.lr is None:  # schedulers count with numbers
            self.defaults["lr"] = config.NOMINAL_LR
        self.non_castable_tensor_keys = set(st.KEYS)
        self.check_lora()
        given = {name: config.check_option(name, value) for name, value in {**options, "lr": lr}.items()}
        self._unsaid.append((given | ({"is_paged": True} if c.is_paged else {}), None))
        self.say_all_idle(with_parameters=False)

    # --- groups -------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; any option of the optimizer may stand in it, other keys are kept untouched.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        count, defaults = len(self.param_groups), self.defaults
        where = f" in parameter group {count}"
        group = self._with_options(dict(param_group) if TORCH_TAKES_NAMES else with_names_apart(param_group), where)
        if "lr" in param_group and self.state:
            self._warn_of_ratio(group, where)
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
        given = {name: value for name, value in param_group.items() if name in config.RULES}
        self._unsaid.append(({name: config.check_option(name, value) for name, value in given.items()}, count))

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
        options = config.respelled(options)
        config.check_rates(options, where)
        if "force_8bit" in group:  # what a group has from the constructor it may make an exception of
            config.check_storage(options, where)
        if "lr" in group:
            config.warn_of_factor(options)
        config.resolve_rates(options)
        config.warn_of_large_rate(options, where if "lr" in group else "")
        if not options["auto_lr"] and 0 < options["lr"] < options["min_lr"]:
            warn_once(
                f"option lr={options['lr']!r}{where}: lies below min_lr={options['min_lr']!r}, which has no effect "
                "then; pass a lower min_lr"
            )
        given = group.get("lr", self._lr)
        group.update(options)
        group.setdefault("base_lr", options["lr"])
        group.setdefault("own_seed", next(iter(self.param_groups), {}).get("own_seed", self._own_seed))
        if options["capturable"] and isinstance(given, Tensor):
            if given.dtype != torch.float32 or given.dim():
                raise TypeError(
                    f"option lr{where}: with capturable=True a tensor is read on the device, and must be a 0-d float32 "
                    f"one; this is {given.dtype} of shape {tuple(given.shape)}"
                )
            group["lr"] = given
        return group

    def _warn_of_ratio(self, group: Group, where: str) -> None:
        """Say what an `lr` means that comes when the rates of other groups are under way to be found."""
        first = next((g["auto_lr_given"] for g in self.param_groups if g["auto_lr"] and g.get("auto_lr_given")), None)
        if group["auto_lr"] and group["auto_lr_given"] and first:
            warn_once(
                f"option lr={group['lr']!r}{where}: with auto_lr=True its ratio to the first group's lr={first!r} "
                f"holds, so the rate here is {group['lr'] / first:g} times that one's; with auto_lr=False it is a rate"
            )

    @staticmethod
    def _check_parameter(p: Tensor) -> None:
        if p.requires_grad:  # of frozen weights in codes (QLoRA's), none ever has a gradient
            st.check_dtype(p)
            if not is_lazy(p):
                st.check_layout(local_tensor(p))

    def _index_parameters(self, first: int = 0) -> None:
        """Note each parameter's ordinal, name and kind, from this group on; facts already known stay as they were."""
        known, self._facts = self._facts, self._facts if first else {}
        ordinal = sum(len(group["params"]) for group in self.param_groups[:first])
        for group in self.param_groups[first:]:
            names = group.get("param_names") or [getattr(p, "original_name", "") for p in group["params"]]
            stride = st.probe_stride(sum(p.numel() for p in group["params"] if not is_lazy(p)))
            for p, name in zip(group["params"], names, strict=True):
                marked = getattr(p, "_is_lora_layer", False) or is_lora_name(name)
                embedding = getattr(p, "_is_embedding", False) or is_embedding_name(name)
                self._facts[p] = known.get(p, Facts(ordinal, bool(marked), bool(embedding), name, stride))
                ordinal += 1

    def check_lora(self) -> None:
        """Say where matrices come in pairs like LoRA's and nothing tells whether they are."""
        parameters = [p for group in self.param_groups if group["lora"] is None for p in group["params"]]
        told = any(self._facts[p].name or self._facts[p].is_lora for p in parameters)
        if (
            parameters
            and not told
            and are_low_rank_pairs([p for p in parameters if p.requires_grad and not is_lazy(p)])
        ):
            warn_once(
                "the LoRA parts of the rule are off: no parameter has a name or a mark that says it is LoRA's. To "
                "switch them on pass lora=True, or model.named_parameters() in place of model.parameters()"
            )

    def say_all_idle(self, with_parameters: bool = True) -> None:
        """Warn, once, of what was set by constructor, groups and overrides and has no effect.

        Args:
            with_parameters: look at the parameters too, which the first step does; all is said then.
        """
        own = {number: given for given, number in self._unsaid if number is not None}
        for given, number in self._unsaid:
            where = "" if number is None else f" in parameter group {number}"
            for name, value in self._wished(given).items():
                # A group's own value stands over the constructor's.
                at = [number] if number is not None else [i for i, _ in enumerate(self.param_groups)]
                groups = [self.param_groups[i] for i in at if i == number or name not in own.get(i, ())]
                idle.say(name, value, self._cases(groups, with_parameters), where)
        if with_parameters:
            self._unsaid.clear()
            for group, p in self._everything() if bnb.overridden_ids() else ():
                where = " in a GlobalOptimManager override"
                given = {k: x for k, x in bnb.overrides_of(p).items() if k in config.GROUP_OPTIONS}
                given = {name: config.check_parameter_option(name, x, where) for name, x in given.items()}
                self.say_idle(given, [(group, p)], where)

    def say_idle(self, given: dict[str, Any], owners: list[tuple[Group, Tensor]], where: str) -> None:
        """Warn of those of these options that have no effect on any of these parameters."""
        for name, value in self._wished(given).items():
            idle.say(name, value, (self._case(group, p) for group, p in owners), where)

    def _wished(self, given: dict[str, Any]) -> dict[str, Any]:
        return idle.wished(given, {**vars(config.AutomagicConfig()), **self._class_options})

    def _cases(self, groups: list[Group], with_parameters: bool) -> Iterator[idle.Case]:
        for group in groups:
            if with_parameters:
                yield from (self._case(group, p) for p in group["params"])
            elif group["params"]:
                yield {**vars(self.config), **group}, None

    def _case(self, group: Group, p: Tensor) -> idle.Case:
        options, facts = self.effective_options(group, p), self.facts_of(p)
        subject = None
        if not is_lazy(p):
            is_lora = facts.counts_as_lora(options)
            subject = idle.Subject(local_tensor(p), bool(facts.name), facts.is_embedding, is_lora)
        return {**vars(self.config), **options}, subject

    def _everything(self) -> list[tuple[Group, Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def name_parameters(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Say what parameters are called, as `model.named_parameters()` does: LoRA and embeddings are told by names.

        To be called before the first step, since random bits and the parts for LoRA follow from names from then on; or
        after a checkpoint of a run with names has been loaded. A name that is known already stays; parameters of others
        are left alone.
        """
        for name, p in named:
            facts = self._facts.get(p)
            if facts is not None and not facts.name:
                is_lora, is_embedding = (
                    facts.is_lora or is_lora_name(name),
                    facts.is_embedding or is_embedding_name(name),
                )
                self._facts[p] = dataclasses.replace(facts, name=name, is_lora=is_lora, is_embedding=is_embedding)

    def log_plan(self) -> None:
        """Say how each group finds its rate and keeps its states."""
        if not logger.handlers and not logging.getLogger().handlers:
            logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)
        for index, group in enumerate(self.param_groups):
            kinds: dict[str, int] = {}
            for p in group["params"]:
                facts = self.facts_of(p)
                kind = st.storage_of(p, self.effective_options(group, p), facts.is_embedding)
                kinds[kind] = kinds.get(kind, 0) + p.numel()
            rate = "found during training" if group["auto_lr"] else f"{group['lr']:g}"
            logger.info("group %d: lr %s; elements by storage: %s", index, rate, kinds)

    def group_of(self, p: Tensor) -> Group:
        """The group that a parameter is in.

        Raises:
            KeyError: it is in none.
        """
        count, owners = self._owners
        number, owner = owners.get(p, (0, None))
        if owner is None or count != len(self.param_groups) or self.param_groups[number] is not owner:
            owners = {q: (i, group) for i, group in enumerate(self.param_groups) for q in group["params"]}
            self._owners = len(self.param_groups), owners
            number, owner = owners.get(p, (0, None))
        if owner is None:
            raise KeyError(f"a tensor of shape {tuple(p.shape)} is no parameter of this optimizer")
        return owner

    def facts_of(self, p: Tensor) -> Facts:
        if p not in self._facts:  # a wrapper has put another tensor into the group
            self._index_parameters()
        return self._facts[p]

    def effective_options(self, group: Group, p: Tensor) -> dict[str, Any]:
        """The options in force for one parameter: its group's, under its override. Without a mask, as LoRA's matrices
        are unless `lora_mask` says otherwise, none adapts, in 32 bits neither.

        Raises:
            TypeError, ValueError: the override holds an unknown option or an illegal value.
        """
        config.complete_betas(group)
        override = self.override_of(p)
        options = self._overridden(group, override) if override else group
        if options["mask_bits"] and (options["lora_mask"] or not self.facts_of(p).counts_as_lora(options)):
            return options
        return {**options, "mask_bits": 0, "warmup_steps": 0}

    def source_of(self, group: Group, p: Tensor) -> Any:
        """Equal for parameters whose options are the same: LoRA's of a group, its others, one with an override."""
        return id(p) if self.override_of(p) else (id(group), self.facts_of(p).counts_as_lora(group))

    def override_of(self, p: Tensor) -> dict[str, Any]:
        """What `GlobalOptimManager` and `requantize` say of this very parameter."""
        override = bnb.overrides_of(p)
        if self._overrides and p in self._overrides:
            override = {**override, **self._overrides[p]}
        return override

    @staticmethod
    def _overridden(group: Group, override: dict[str, Any]) -> dict[str, Any]:
        where = " in a GlobalOptimManager override"
        ours = {name: value for name, value in override.items() if name not in FOREIGN_OVERRIDES}
        checked = config.respelled({k: config.check_parameter_option(k, value, where) for k, value in ours.items()})
        options = {**group, **checked}
        if "lr" in checked:  # bitsandbytes' meaning: this rate, whatever the group's
            options["auto_lr"] = checked.get("auto_lr")
        config.check_rates({**options, "lr": checked.get("lr")}, where)
        if checked.get("force_8bit"):
            config.check_storage(options, where)
        if "lr" in checked:
            config.resolve_rates(options)
            options["base_lr"] = options["initial_lr"] = options["lr"]
        return options

    def adopt_overrides(self) -> None:
        if not self.initialized:
            bnb.adopt_module_overrides({id(p) for p in self._facts})
            self.initialized = True

    def get_config(self, gindex: int, pindex: int, group: Group) -> dict[str, Any]:
        """bitsandbytes' name for `effective_options`."""
        return self.effective_options(group, self.param_groups[gindex]["params"][pindex])

    # --- state --------------------------------------------------------------------------------------------------

    def init_state(self, group: Group, p: Tensor, gindex: int = 0, pindex: int = 0) -> None:
        """Make the state of one parameter, or add what newly switched-on options need."""
        options = self.effective_options(group, p)
        state, cut_otherwise = self.state[p], self._is_cut_otherwise(p)
        if "state1" in state:
            storage = st.storage_held(state)
        else:
            sized = local_tensor(p) if cut_otherwise else p
            storage = st.storage_of(sized, options, self.facts_of(p).is_embedding)
        self.completed(p, state, storage, options)
        if cut_otherwise:
            state["shard"] = st.shard_of(p)  # lets a checkpoint of another process's part be told

    @staticmethod
    def _is_cut_otherwise(p: Tensor) -> bool:
        """Whether only a part of the parameter lives here that `sharded` knows nothing of: it is stepped by itself."""
        if st.shard_of(p) is None or sharded.shard_of(p) is not None:
            return False
        warn_once(
            "a parameter is sharded otherwise than by rows (tensor parallel): each process steps its part as a "
            "parameter of its own, so results are close to an unsharded run's, not equal to them"
        )
        return True

    def completed(self, p: Tensor, state: st.State, storage: str, options: dict[str, Any]) -> st.State:
        """`state.complete` for a state of p that may be under way, where confidence was switched on or was not saved.

        r then starts where its bias-corrected value is 1, about that of a settled run: at 0 it would count as full
        confidence and make the steps ten times too large.
        """
        joins = options["came"] and not {"state3", "exp_avg_res_row"} & state.keys()
        stride = self.facts_of(p).probe_stride
        if (shard := sharded.shard_of(p)) is not None and options["auto_lr"]:
            state.update({k: v for k, v in shard.probes(stride).items() if k not in state})
        st.complete(state, sharded.stepped(p), storage, options, self.is_paged, stride)
        if joins and state["step"] > 0:
            value = 1 - options["betas"][2] ** state["step"]
            if storage in st.FACTORED:
                state["exp_avg_res_row"].fill_(value)
                state["exp_avg_res_col"].fill_(value)
            elif storage == "8bit":
                state["state3"].fill_(q.LAST_CODE)
                state["absmax3"].fill_(value / float(state["qmap2"][q.LAST_CODE]))
            else:
                state["state3"].fill_(value)
        return state

    def prepared_state(self, group: Group, p: Tensor, options: dict[str, Any]) -> st.State:
        """The state of one parameter, with all that these options need."""
        direction.check(p, options, self.facts_of(p).counts_as_lora(options))
        state, sized = self.state[p], local_tensor(p) if "shard" in self.state[p] else p
        if not st.is_complete(state, p, options):
            self.init_state(group, p)
        if self.override_of(p):  # one may have come when the state was there already
            held, wanted = st.storage_held(state), st.storage_of(sized, options, self.facts_of(p).is_embedding)
            if held != wanted:
                warn_once(
                    f"the state of a parameter of shape {tuple(p.shape)} is kept in {held}, its options say {wanted} "
                    "now; call optimizer.requantize() to convert it"
                )
        return state

    # --- copies -------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        self.adopt_overrides()
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
        self._unsaid = []
        if facts is None:
            return
        for group in self.param_groups:  # in a pickle of an earlier version there may be an option less
            for name in config.GROUP_OPTIONS:
                group.setdefault(name, getattr(self.config, name))
        self.non_castable_tensor_keys = set(st.KEYS)
        self.name2qmap, self.initialized, self._owners = {}, False, (0, {})
        bnb.restore_managers(self)
        self.state = defaultdict(st.WatchedState, st.watched(self.state))
        parameters = [p for group in self.param_groups for p in group["params"]]
        self._facts = dict(zip(parameters, facts, strict=True))
        overrides = overrides or [({}, {})] * len(parameters)
        self._overrides = {p: dict(own) for p, (_, own) in zip(parameters, overrides, strict=True) if own}
        for p, (shared, _) in zip(parameters, overrides, strict=True):
            bnb.override(p, shared)
        for p, values in self.state.items():
            if not isinstance(p, Tensor) or "state1" not in values:
                continue
            st.link_code_books(values, local_tensor(p).device)
            if self.is_paged:  # a copy is in ordinary memory, for which there must be room
                for name in st.ELEMENT_KEYS & values.keys():
                    held = values[name]
                    like = sharded.stepped(p)
                    values[name] = st.empty_element_state(like, held.dtype, True, held.shape).copy_(held)
