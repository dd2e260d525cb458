"""What a key is called elsewhere, and which key someone meant who wrote another name."""

import difflib
from collections.abc import Iterable

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


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of the `known` names that someone meant who wrote `word`; None: none is like it."""
    known, key = list(known), KEY_OF_FOREIGN_NAME.get(word)
    return key if key in known else next(iter(difflib.get_close_matches(word, known, n=1)), None)


def unit_note(word: str) -> str:
    """What follows the key in a suggestion for `word`; "": the key has the unit that the word has elsewhere."""
    return f" ({unit})" if (unit := NAMES_IN_OTHER_UNIT.get(word)) else ""


def suggest(word: str, known: Iterable[str], or_else: str = "") -> str:
    """The end of a message about an unknown name: which one was meant, or all; `or_else` stands for too many."""
    known = list(known)
    if close := closest(word, known):
        return f"; did you mean '{close}'{unit_note(word)}?"
    return f"; {or_else}" if or_else and len(known) > MOST_LISTED else f"; expected one of {', '.join(known)}"
