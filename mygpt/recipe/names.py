"""What a key is called elsewhere, which key someone meant who wrote another name, and file names with keys."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

MOST_LISTED = 20
"""Names in a message that has nothing closer to suggest."""

KEYS_BY_FOREIGN_NAME = {
    "lr": ("learning_rate", "peak_lr", "max_lr", "matrix_lr"),
    "min_lr": ("lr_min", "min_learning_rate"),
    "steps": (
        *("max_steps", "max_iters", "num_steps", "num_iterations", "iterations", "train_steps"),
        *("epochs", "num_train_epochs", "max_tokens", "lr_decay_iters"),
    ),
    "batch_size": ("global_batch_size", "train_batch_size", "total_batch_size"),
    "micro_batch_size": (
        *("local_batch_size", "device_batch_size", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "accumulation_steps"),
    ),
    "seq_len": ("max_seq_length", "sequence_length", "seq_length", "context"),
    "max_seq_len": ("block_size", "context_length", "max_position_embeddings", "n_positions", "n_ctx"),
    "num_layers": ("n_layer", "n_layers", "num_hidden_layers", "depth"),
    "num_heads": ("n_head", "n_heads", "num_attention_heads"),
    "embed_dim": ("n_embd", "d_model", "hidden_size", "model_dim", "width"),
    "biases": ("bias",),
    "tied_head": ("tie_embeddings", "tie_word_embeddings", "weight_tying"),
    "vocab_multiple": ("padding_multiple",),
    "beta1": ("adam_beta1",),
    "beta2": ("adam_beta2",),
    "eps": ("adam_epsilon",),
    "max_grad_norm": ("grad_clip", "max_norm", "clip_grad", "gradient_clip_val"),
    "schedule": ("lr_scheduler_type", "lr_schedule", "decay_type", "decay_lr"),
    "warmup": ("warmup_steps", "warmup_iters", "lr_warmup_steps", "warmup_ratio"),
    "wsd_decay": ("decay_ratio", "warmdown_ratio", "cooldown"),
    "val_every": ("eval_interval", "eval_every", "eval_steps"),
    "eval_batches": ("eval_iters", "n_eval_batches"),
    "val_split": ("val_fraction", "validation_split", "test_size"),
    "patience": ("early_stopping_patience",),
    "log_every": ("log_interval", "logging_steps"),
    "save_every": ("save_interval", "save_steps", "checkpoint_every"),
    "keep_last": ("save_total_limit", "keep_latest_k"),
    "save_best": ("load_best_model_at_end",),
    "resume": ("resume_from_checkpoint",),
    "output": ("out", "out_dir", "output_dir", "dump_folder", "save_dir"),
    "corpus": ("dataset", "data", "data_dir", "data_path", "train_file", "text"),
    "val_corpus": ("val_file", "validation_file", "val_data", "eval_dataset"),
    "init_from": ("model_name_or_path", "from_pretrained", "pretrained", "init_weights", "checkpoint"),
    "tokenizer_file": ("tokenizer_path",),
    "precision": ("dtype", "bf16", "fp16", "mixed_precision", "amp"),
    "compile": ("torch_compile",),
    "activation_checkpointing": ("gradient_checkpointing",),
}
"""For each key, names of nearly the same thing in the programs and courses that users come from."""

NAMES_IN_OTHER_UNIT = {
    **dict.fromkeys(("epochs", "num_train_epochs", "max_tokens"), "of batch_size * seq_len tokens each"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulation_steps"), "the windows of one forward pass"),
    **dict.fromkeys(("warmup_ratio", "decay_ratio", "warmdown_ratio"), "a number of steps"),
}
"""Names of a quantity for which the key has another unit, with that of the key."""

KEY_OF_FOREIGN_NAME = {name: key for key, names in KEYS_BY_FOREIGN_NAME.items() for name in names}


NOTES = {
    **dict.fromkeys(
        ("wandb", "wandb_project", "wandb_log", "tensorboard", "report_to"),
        "metrics.jsonl in the run directory has the numbers; `mygpt plot RUN` draws them",
    ),
    **dict.fromkeys(
        ("gpus", "num_gpus", "devices", "num_processes", "nproc_per_node", "world_size"),
        "the launcher starts the processes: `accelerate launch --config_file recipes/launch/ddp.yaml ...`",
    ),
    **dict.fromkeys(("optimizer", "optim"), "the optimizer is AdamW, with lr, beta1, beta2, eps and weight_decay"),
    **dict.fromkeys(
        ("model", "model_type", "model_size"), "embed_dim, num_heads and num_layers choose the model's size"
    ),
    **dict.fromkeys(("name", "run_name"), "output names the run's directory"),
    "config": "the recipe is the first argument: mygpt train RECIPE.toml",
}
"""What to say of names in other programs for which there is no key."""

CLOSE = 0.7
"""How alike a misspelt name and the one that was meant are, at least, on the scale of difflib."""


MAX_CHANGES = 80
"""Characters of a file name that say what has changed."""


def named_after(name: str, was: Mapping[str, Any], now: Mapping[str, Any], keys: Set[str]) -> str:
    """`name` followed by those of the `keys` whose values differ, as in hardened-lr=0.0003: a short name for a file."""
    changed = {key: value for key, value in now.items() if key in keys and value != was[key]}
    if len({changed.get(key) for key in ("init_seed", "data_seed")}) == 1 and "data_seed" in changed:
        changed = {"seed": changed.pop("data_seed")} | changed
        del changed["init_seed"]
    shown = {key: value if isinstance(value, str) else str(value).lower() for key, value in changed.items()}
    text = "".join(f"-{key}={value}" for key, value in shown.items())
    safe = re.sub(r"[^\w.,=+-]+", "_", text, flags=re.ASCII)
    if len(safe) > MAX_CHANGES:
        safe = f"{safe[: MAX_CHANGES - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name + safe


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of the `known` names that someone meant who wrote `word`; None: none is like it."""
    known, key = list(known), KEY_OF_FOREIGN_NAME.get(word)
    return key if key in known else next(iter(difflib.get_close_matches(word, known, n=1, cutoff=CLOSE)), None)


def unit_note(word: str) -> str:
    """What follows the key in a suggestion for `word`; "": the key has the unit that the word has elsewhere."""
    return f" ({unit})" if (unit := NAMES_IN_OTHER_UNIT.get(word)) else ""


def suggest(word: str, known: Iterable[str], or_else: str = "") -> str:
    """The end of a message about an unknown name: which one was meant, or all; `or_else` stands for too many."""
    known = list(known)
    if word in NOTES:
        return f"; {NOTES[word]}"
    if close := closest(word, known):
        return f"; did you mean '{close}'{unit_note(word)}?"
    return f"; {or_else}" if or_else and len(known) > MOST_LISTED else f"; expected one of {', '.join(known)}"
