"""Find the token stores that a run was trained on, to search them for test items (`firth evaluate --contamination RUN`)."""

from __future__ import annotations

from pathlib import Path

from firth.data.token_store import TokenStore
from firth.evaluate.prompting.contamination import TrainingText
from firth.io.integrity import check_recipe
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe, load_resolved
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, UserError


def training_texts(directory: Path) -> list[TrainingText]:
    """Return the training text of a run, and of the runs that it started from.

    A warning names each run, and each part of a mixture, whose text is not there to be searched.

    Raises:
        UserError: This is no run, or neither it nor the runs before it have a token store.
    """
    found: list[TrainingText] = []
    place = _run_of(directory)
    if not (place / "recipe.yaml").is_file():
        raise UserError(f"--contamination {directory}: this is not a run directory: name a run of `firth train`")
    seen: set[Path] = set()
    while place.resolve() not in seen:
        seen.add(place.resolve())
        check_recipe(place)
        recipe, tokenizer = load_resolved(place), Tokenizer.load(place)
        stores = [TokenStore.open(store, tokenizer) for store in _stores(place, recipe, tokenizer)]
        if stores:
            found.append(TrainingText(str(place), stores, tokenizer))
        if not recipe.init_from:
            break
        place = _run_of(Path(recipe.init_from))
        if not (place / "recipe.yaml").is_file():
            _not_searched(f"the training text of {place}, which is no run directory")
            break
    if not found:
        raise UserError(
            f"--contamination {directory}: there is no token store of its training text: a run on records has none, and that of "
            "a run on text is in its data directory, or in data.cache_dir while the text files are unchanged"
        )
    return found


def _run_of(path: Path) -> Path:
    """Return the run directory of a model directory, or the path itself if it is no part of a run."""
    return path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else path


def _not_searched(what: str) -> None:
    LOGGER.warning(f"--contamination: not searched: {what}")


def _stores(place: Path, recipe: ResolvedRecipe, tokenizer: Tokenizer) -> list[Path]:
    """Return the directories of the training stores of a run, without those of the runs before it."""
    if not recipe.examples.reads_documents:
        _not_searched(f"the records of {place}, since only text has a token store")
        return []
    if not recipe.data.cache_dir:
        found, count = sorted((place / "data").glob("*/train")), len(recipe.data.weights) or 1
        if len(found) < count:
            _not_searched(f"{count - len(found)} of {count} token stores of {place}, missing in {place / 'data'}")
        return found
    data, found = RunData(recipe.data, tokenizer, place), []
    for part in data.per_path() if recipe.data.weights else [data]:
        try:
            store = part.store_directory() / "train"
        except (UserError, OSError) as error:  # a text file is gone
            _not_searched(f"a token store of {place}: {error}")
            continue
        if store.is_dir():
            found.append(store)
        else:
            named = ", ".join(part.config.path) or part.config.corpus
            _not_searched(f"{named} of {place}: data.cache_dir has no token store of the text as it is now")
    return found
