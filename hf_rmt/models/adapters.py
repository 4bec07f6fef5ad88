"""Adapters of peft on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn


def is_adapter(source: Any) -> bool:
    """Whether this is the folder of a peft adapter."""
    return isinstance(source, (str, Path)) and (Path(source) / "adapter_config.json").is_file()


#: The class of transformers that peft puts adapters of a task on.
_TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


def load_adapter(folder: Path, other: Any) -> nn.Module:
    """A peft adapter on its base: the one that it names, or the other side where that cannot be had.

    Raises:
        ValueError: there is no base, or it is not that of the adapter, or the adapter is no safetensors file.
    """
    import transformers
    from peft import PeftConfig, PeftModel

    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder} holds no adapter_model.safetensors; other formats are not read")
    settings = PeftConfig.from_pretrained(str(folder))
    named = (settings.auto_mapping or {}).get("base_model_class") if settings.task_type is None else None
    cls = getattr(transformers, named or _TASK_CLASSES.get(str(settings.task_type), "AutoModel"), None)
    if cls is None:
        raise ValueError(f"{folder} adapts {named}, which transformers has not: load it yourself and pass the model")
    base = _load_base(cls, folder, settings.base_model_name_or_path, other)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder))
    except RuntimeError as error:  # of torch, whose message lists every tensor
        raise ValueError(
            f"{folder} does not fit {base.config._name_or_path}: load it on its base yourself and pass the model; "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    _check_loaded(adapted, folder)
    return adapted.eval()


def _load_base(cls: Any, folder: Path, named: str | None, other: Any) -> Any:
    """The base of an adapter, from the first place that has it."""
    candidates = [named] if named else []
    if isinstance(other, (str, Path)) and not is_adapter(other):
        candidates.append(str(other))
    reasons = []
    for candidate in candidates:
        try:
            return cls.from_pretrained(candidate, use_safetensors=True)
        except OSError as error:
            reasons.append(" ".join(str(error).split())[:200])
    raise ValueError(
        f"the base of the adapter {folder} cannot be loaded ({'; '.join(reasons) or 'it names none'}): "
        "load the adapter on it yourself and pass the model"
    )


def _check_loaded(adapted: Any, folder: Path) -> None:
    """Peft leaves adapter weights that it does not find at their initial values, with no more than a warning."""
    from peft.utils import get_peft_model_state_dict, load_peft_weights

    found = load_peft_weights(str(folder), device="cpu")
    missing = sorted(set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(found))
    if missing:
        raise ValueError(
            f"{folder} lacks {missing[0]} ({len(missing)} tensors in all), so it was not trained on this class of "
            "model: load it yourself and pass the model"
        )
