"""Opens the folder of a draft model, and checks it against that of the model, before weights are read."""

from pathlib import Path
from typing import Any

from helix_jax.drafting import check_draft_model
from helix_jax.folder import ModelFolder
from helix_jax.plan import Plan
from helix_jax.speculation import SPECULATIONS


def open_draft(name: str, speculate: Any, model: ModelFolder, plan: Plan, max_len: int) -> ModelFolder | None:
    """Open the folder of a draft model. Return None if `speculate` is something else than a folder.

    Args:
        name: The option, as error messages name it.
        speculate: How tokens are drafted: a path, an id on the Hugging Face Hub, or anything else.
        model: The model that it drafts for.
        plan: How the mesh decodes with both.
        max_len: The most positions of a request.

    Raises:
        MissingPackageError: As `ModelFolder.open`.
        ValueError: As `ModelFolder.open` and `check_draft_model`; or the mesh does not divide the heads of the draft
            model, or the tokenizers give a token different ids.
    """
    if not is_draft_folder(speculate):
        return None
    if "/" not in str(speculate) and not Path(speculate).exists():
        raise ValueError(f"{name} is '{speculate}': give {', '.join(SPECULATIONS)}, or the folder of a draft model")
    draft = ModelFolder.open(speculate)
    check_draft_model(model.config, draft.config, max_len)
    _check_vocabulary(speculate, model.tokenizer, draft.tokenizer)
    try:
        plan.check_model(draft.config)
    except ValueError as error:
        raise ValueError(f"the draft model: {error}") from None
    return draft


def is_draft_folder(speculate: Any) -> bool:
    """Return whether `speculate` is a folder, rather than another way to draft tokens."""
    return isinstance(speculate, str | Path) and speculate not in SPECULATIONS


def _check_vocabulary(folder: str | Path, tokenizer: Any, draft_tokenizer: Any) -> None:
    """Check that two tokenizers have the same tokens, if both models have one."""
    if tokenizer is None or draft_tokenizer is None:
        return
    ours, theirs = tokenizer.vocabulary, draft_tokenizer.vocabulary
    for token in sorted(ours.keys() | theirs.keys()):
        if ours.get(token) != theirs.get(token):
            raise ValueError(
                f"'{folder}' has another vocabulary than the model: token {token!r} has id {theirs.get(token)}, "
                f"not {ours.get(token)}: give a draft model with the same tokenizer"
            )
