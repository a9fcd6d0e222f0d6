"""Find the token stores that a run was trained on, to search them for test items (`firth evaluate --contamination RUN`)."""

from __future__ import annotations

from pathlib import Path

from firth.data.token_store import TokenStore
from firth.evaluate.prompting.contamination import TrainingText
from firth.io.integrity import check_recipe
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe, load_resolved
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError


def training_texts(directory: Path) -> list[TrainingText]:
    """Return the training text of a run, and of the runs that it started from.

    Raises:
        UserError: This is no run, or neither it nor the runs before it have a token store.
    """
    found: list[TrainingText] = []
    place = directory
    seen: set[Path] = set()
    while (place / "recipe.yaml").is_file() and place.resolve() not in seen:
        seen.add(place.resolve())
        check_recipe(place)
        recipe, tokenizer = load_resolved(place), Tokenizer.load(place)
        stores = [TokenStore.open(store, tokenizer) for store in _stores(place, recipe, tokenizer)]
        if stores:
            found.append(TrainingText(str(place), stores, tokenizer))
        place = Path(recipe.init_from)
    if not seen:
        raise UserError(f"--contamination {directory}: this is not a run directory: name a run of `firth train`")
    if not found:
        raise UserError(
            f"--contamination {directory}: there is no token store of its training text: a run on records has none, and that of "
            "a run on text is in its data directory, or in data.cache_dir while the text files are unchanged"
        )
    return found


def _stores(place: Path, recipe: ResolvedRecipe, tokenizer: Tokenizer) -> list[Path]:
    """Return the directories of the training stores of a run, without those of the runs before it."""
    if not recipe.examples.reads_documents:
        return []
    if not recipe.data.cache_dir:
        return sorted((place / "data").glob("*/train"))
    data = RunData(recipe.data, tokenizer, place)
    parts = data.per_path() if recipe.data.weights else [data]
    return [store for part in parts if (store := part.store_directory() / "train").is_dir()]
