"""The real trainers, on CPU and offline: each test is skipped where its package is not installed."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any of them is imported

import pytest
import torch
from torch import nn

from automagic_bnb import Automagic8bit

VOCABULARY = 96
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def tiny_llama(dtype: torch.dtype = torch.float32) -> Any:
    """Two layers, some 110 thousand parameters; the same weights at every call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **shape)
    )
    return made.to(dtype)


def with_lora(model: Any, rank: int = 64) -> Any:
    """LoRA matrices of 4096 elements, the size from which states are kept in 8 bits."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], lora_dropout=0.0))


def sentences(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Counting up from a random number, which a small model learns."""
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(VOCABULARY, (count, 1), generator=generator)
    tokens = (starts + torch.arange(16)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def trained(model: Any) -> list[torch.Tensor]:
    return [p.detach() for p in model.parameters() if p.requires_grad]


# --------------------------------------------------------------------------------------------------------- transformers


def hugging_face_trainer(model: Any, folder: Path, steps: int, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 0.4},
        warmup_steps=2,
        logging_steps=1,
        save_steps=5,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=5,
    )
    return transformers.Trainer(
        model=model, args=args, train_dataset=sentences(), optimizer_cls_and_kwargs=(Automagic8bit, options)
    )


@pytest.mark.parametrize("lora", [True, False])
def test_hugging_face_trainer_trains(lora: bool, tmp_path: Path) -> None:
    """From its optimizer class and arguments, with the schedule and the empty second group it makes for LoRA."""
    model = with_lora(tiny_llama()) if lora else tiny_llama()
    trainer = hugging_face_trainer(model, tmp_path, 40 if lora else 30, lr=5e-3, lora=lora)
    trainer.train()
    opt = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    assert type(opt) is Automagic8bit
    assert bool(opt.param_groups[1]["params"]) == (not lora)
    assert {str(s["state1"].dtype) for s in opt.state.values() if s["state1"].numel() >= 4096} == {"torch.uint8"}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates[0] == 0.0
    assert max(rates) == pytest.approx(5e-3)


@pytest.mark.parametrize("lr", [1e-3, None])
def test_hugging_face_trainer_resumes_bit_for_bit(lr: float | None, tmp_path: Path) -> None:
    """`resume_from_checkpoint` after 5 of 10 steps ends in the weights of the uninterrupted run, in bfloat16."""
    whole = tiny_llama(torch.bfloat16)
    hugging_face_trainer(whole, tmp_path / "run", 10, lr=lr).train()
    resumed = tiny_llama(torch.bfloat16)
    hugging_face_trainer(resumed, tmp_path / "run", 10, lr=lr).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5")
    )
    assert all(torch.equal(a, b) for a, b in zip(trained(whole), trained(resumed), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(whole), trained(tiny_llama(torch.bfloat16)), strict=True))


# ------------------------------------------------------------------------------------------------------------------ TRL


def sft_trainer(model: Any, folder: Path, steps: int, **options: Any) -> Any:
    """TRL's, over numbers spelled as words, with the LoRA made by itself."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(VOCABULARY - 2)} | {"<pad>": VOCABULARY - 2, "<end>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    texts = [" ".join(str(int(x) % (VOCABULARY - 2)) for x in row["input_ids"]) for row in sentences()]
    args = trl.SFTConfig(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, logging_steps=1, save_steps=5,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=5,
    )  # fmt: skip
    return trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"),
        peft_config=peft.LoraConfig(r=64, target_modules=["q_proj", "down_proj"], lora_dropout=0.0),
        optimizer_cls_and_kwargs=(Automagic8bit, options),
    )


@pytest.mark.parametrize("lr", [5e-3, None])
def test_trl_trains_and_resumes_bit_for_bit(lr: float | None, tmp_path: Path) -> None:
    """A LoRA over a small Llama, half of the run from a checkpoint."""
    whole = sft_trainer(tiny_llama(), tmp_path / "run", 10, lr=lr, lora=True)
    whole.train()
    resumed = sft_trainer(tiny_llama(), tmp_path / "run", 10, lr=lr, lora=True)
    start = [p.clone() for p in trained(resumed.model)]
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert all(torch.equal(a, b) for a, b in zip(trained(whole.model), trained(resumed.model), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(trained(whole.model), start, strict=True))


# ----------------------------------------------------------------------------------------------------------- accelerate


def accelerator() -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).to(torch.bfloat16)


def accelerated_steps(acc: Any, model: Any, opt: Any, scheduler: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step)).bfloat16()
        with acc.accumulate(model):
            acc.backward((model(x) - x).float().square().mean())
            acc.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            scheduler.step()
            opt.zero_grad()


@pytest.mark.parametrize("steps_before", [0, 3])
@pytest.mark.parametrize("lr", [1e-3, None])
def test_accelerate_prepares_without_changing_a_bit(lr: float | None, steps_before: int, tools: Any) -> None:
    """`prepare` sends the state through state_dict and load_state_dict, before or after steps."""
    acc, model = accelerator(), small_model()
    opt = Automagic8bit(model.parameters(), lr=lr)
    tools.train(opt, list(model.parameters()), range(steps_before))
    before = tools.snapshot(opt)
    prepared_model, prepared = acc.prepare(model, opt)
    assert not tools.differences(before, tools.snapshot(prepared.optimizer))
    assert prepared.optimizer is opt
    twin = small_model()
    twin.load_state_dict(model.state_dict())
    twin_opt = Automagic8bit(twin.parameters(), lr=lr)
    twin_opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    tools.train(prepared, list(prepared_model.parameters()), range(5, 9))
    tools.train(twin_opt, list(twin.parameters()), range(5, 9))
    assert not tools.differences(tools.snapshot(opt), tools.snapshot(twin_opt))


@pytest.mark.parametrize("lr", [1e-3, None])
def test_accelerate_saves_and_resumes_bit_for_bit(lr: float | None, tmp_path: Path, tools: Any) -> None:
    """`save_state` and `load_state` with a schedule: 5 steps and 5 more are 10."""
    snapshots = []
    for resume in (False, True):
        acc, model = accelerator(), small_model()
        opt = Automagic8bit(model.parameters(), lr=lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)
        model, prepared, scheduler = acc.prepare(model, opt, scheduler)
        if resume:
            acc.load_state(str(tmp_path / "half"))
        else:
            accelerated_steps(acc, model, prepared, scheduler, range(5))
            acc.save_state(str(tmp_path / "half"))
        accelerated_steps(acc, model, prepared, scheduler, range(5, 10))
        snapshots.append(tools.snapshot(opt))
    assert not tools.differences(*snapshots)


# ----------------------------------------------------------------------------------------------------------------- peft


def test_peft_builds_loraplus_groups(tools: Any) -> None:
    """Four groups, some of them empty, with their own rates; the larger may lie above 1e-3."""
    optimizers = pytest.importorskip("peft.optimizers")
    model = with_lora(tiny_llama())
    opt = optimizers.create_loraplus_optimizer(model, optimizer_cls=Automagic8bit, lr=2e-4, loraplus_lr_ratio=16)
    assert [bool(g["params"]) for g in opt.param_groups] == [True, False, True, False]
    assert [g["lr"] for g in opt.param_groups] == pytest.approx([2e-4, 1e-6, 3.2e-3, 3.2e-3])
    assert not any(g["auto_lr"] for g in opt.param_groups)
    before = [p.clone() for p in trained(model)]
    losses = []
    for step in range(20):
        batch = sentences()[4 * (step % 8) :][:4]
        tokens = torch.stack([row["input_ids"] for row in batch])
        opt.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(not torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


def test_peft_parameters_are_known_by_their_names() -> None:
    """Named parameters carry `lora_A` and `lora_B`; plain ones need `lora=True` in their group."""
    model = with_lora(tiny_llama())
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opt = Automagic8bit(named, lr=1e-3)
    plain = Automagic8bit([p for _, p in named], lr=1e-3)
    assert all(opt.facts_of(p).is_lora for _, p in named)
    assert not any(plain.facts_of(p).is_lora for _, p in named)


# ------------------------------------------------------------------------------------------------------------ diffusers


def test_bfloat16_lora_of_a_diffusers_transformer_moves() -> None:
    """At a small rate: without stochastic rounding most of a bfloat16 weight's updates would be lost."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    from peft import LoraConfig

    torch.manual_seed(0)
    shape = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8), "in_channels": 4}
    model = diffusers.FluxTransformer2DModel(**shape, **widths).to(torch.bfloat16)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=16, target_modules=["to_q", "to_k"], init_lora_weights="gaussian"))
    lora = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert {p.dtype for _, p in lora} == {torch.bfloat16}
    opt = Automagic8bit(lora, lr=1e-4, min_8bit_size=0)
    before = [p.detach().clone() for _, p in lora]
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
    }
    ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}
    for _ in range(20):
        output = model(**{k: v.bfloat16() for k, v in inputs.items()}, **ids, return_dict=False)[0]
        output.float().square().mean().backward()
        opt.step()
        opt.zero_grad()
    for (name, p), start in zip(lora, before, strict=True):
        assert (p != start).float().mean() > 0.1, name
        assert torch.isfinite(p).all()
    assert all(opt.facts_of(p).is_lora for _, p in lora)


# ------------------------------------------------------------------------------------------------------------ lightning


def lightning_module() -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, lr: float | None) -> None:
            super().__init__()
            self.model, self.lr = small_model(), lr
            self.seen: list[bool] = []

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            self.seen.append(torch.is_grad_enabled())
            x = batch[0].bfloat16()
            return (self.model(x) - x).float().square().mean()

        def configure_optimizers(self) -> Any:
            opt = Automagic8bit(self.model.parameters(), lr=self.lr)
            return [opt], [torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=20)]

    return Module


def lightning_fit(module: Any, folder: Path, steps: int, **more: Any) -> Any:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

    data = torch.utils.data.TensorDataset(torch.randn(40, 64, generator=torch.Generator().manual_seed(1)))
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=CSVLogger(str(folder)),
        callbacks=[LearningRateMonitor("step", log_momentum=True), ModelCheckpoint(folder, every_n_train_steps=5)],
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), **more)
    return trainer


@pytest.mark.parametrize("lr", [1e-3, None])
def test_lightning_trains_and_resumes_bit_for_bit(lr: float | None, tmp_path: Path) -> None:
    """Its closure is called once a step with gradients enabled; its monitor reads `betas`; 5 + 5 steps are 10."""
    make = lightning_module()
    whole, half, resumed = make(lr), make(lr), make(lr)
    trainer = lightning_fit(whole, tmp_path / "whole", 10)
    assert whole.seen == [True] * 10
    monitor = trainer.callbacks[0]
    (rates,) = monitor.lrs.values()
    assert rates[0] == (lr or 1e-3)  # nominal, where none is given
    assert rates[-1] < rates[0]  # the second epoch's
    assert monitor.last_momentum_values == {"lr-Automagic8bit-momentum": 0.9}
    lightning_fit(half, tmp_path / "half", 5)
    (checkpoint,) = (tmp_path / "half").glob("*.ckpt")
    lightning_fit(resumed, tmp_path / "resumed", 10, ckpt_path=str(checkpoint))
    assert len(resumed.seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters(), half.parameters(), strict=True))
