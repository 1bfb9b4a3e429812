"""Models with some thousand random weights, and images to train them with, in folders as trainers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

WIDTH = 32
"""Of the text encoders, and of what a picture's parts are compared with."""


def clip_tokenizer(folder: Path) -> None:
    """Of single bytes, without merges, so that any text can be read."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True)
    letters = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    words = [*letters, *(x + "</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)


def t5_tokenizer(folder: Path) -> None:
    """Of single characters."""
    import tokenizers
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((chr(i), -5.0) for i in range(33, 127)), ("▁", -5.0)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    unigram.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    T5TokenizerFast(tokenizer_object=unigram, extra_ids=0, model_max_length=512).save_pretrained(folder)


def clip_config() -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def vae(channels: int) -> Any:
    """That halves a picture's sides."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        shift_factor=0.0,
    )


def sdxl(folder: Path) -> None:
    """Stable Diffusion XL."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(4, 8),
        transformer_layers_per_block=1,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
        norm_num_groups=8,
    )
    parts = {
        "unet": unet,
        "vae": vae(4),
        "text_encoder": CLIPTextModel(clip_config()),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "scheduler": DDPMScheduler(),
    }
    write(folder, "StableDiffusionXLPipeline", parts)
    for name in ("tokenizer", "tokenizer_2"):
        clip_tokenizer(folder / name)


def flux(folder: Path) -> None:
    """Flux."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,  # 2 × 2 places of the latents' four channels
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    t5 = T5Config(vocab_size=128, d_model=WIDTH, d_kv=8, d_ff=2 * WIDTH, num_layers=1, num_heads=4)
    parts = {
        "transformer": transformer,
        "vae": vae(4),
        "text_encoder": CLIPTextModel(clip_config()),
        "text_encoder_2": T5EncoderModel(t5),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    write(folder, "FluxPipeline", parts)
    clip_tokenizer(folder / "tokenizer")
    t5_tokenizer(folder / "tokenizer_2")


def write(folder: Path, pipeline: str, parts: dict[str, Any]) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": "0.30.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    tokenizers = {"tokenizer": ["transformers", "CLIPTokenizer"]}
    second = "T5TokenizerFast" if pipeline == "FluxPipeline" else "CLIPTokenizer"
    tokenizers["tokenizer_2"] = ["transformers", second]
    (folder / "model_index.json").write_text(json.dumps({**index, **tokenizers}))


def images(folder: Path, captions: bool, count: int = 4) -> None:
    """Noise, 40 × 40; with captions in a metadata.jsonl, as `datasets` reads it."""
    from PIL import Image

    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    for i, picture in enumerate(noise):
        Image.fromarray(picture).save(folder / f"{i}.png")
    if captions:
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"a picture, number {i}"}) for i in range(count)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))


def llama(folder: Path) -> None:
    """With a tokenizer of single bytes, and places for tokens that a template adds."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    words = {letter: i for i, letter in enumerate(sorted(byte_level.alphabet()))} | {"<pad>": 256, "<end>": 257}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(words, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level(False), tokenizers.decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.save_pretrained(folder)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, num_key_value_heads=2, **shape)).save_pretrained(folder)
