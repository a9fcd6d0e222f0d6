"""The head of a task that an adapter of peft's brings along, for a base that has none.

Who finetunes with peft takes a class with a head that is new (`AutoModelForSequenceClassification` of a bare BERT), and peft
saves what of it was trained (`modules_to_save`) beside the adapter. The class is the one that the adapter's task, or its
`auto_mapping`, names in the base's family; what of its head the adapter has not (BERT's pooler) is the base's own.

    {"classifier.weight": (3, 384), "classifier.bias": (3,)} on MiniLM  ->  parts {"classes": pooler, tanh, linear map}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from firth.io.safetensors import read_json, read_tensors
from firth.model.empty_weights import init_empty_weights
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.pretrained.families import FAMILIES
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, from_hf, resolve_names
from firth.pretrained.families.heads import known
from firth.types import UserError

TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
"""The end of a class's name -> peft's word for its task."""


def bring(model: LM, config: Mapping[str, Any], whole: Mapping[str, Tensor], base: Path, where: Path) -> None:
    """Put an adapter's head in the place of the model's parts, where the base has not that very head.

    config: adapter_config.json. whole: the tensors that the adapter holds whole, by their names in the class. base: the
    directory of the model. Raises UserError for a head of which neither the adapter nor the base has a tensor.
    """
    said = read_json(base / "config.json")
    family = FAMILIES.get(str(said.get("model_type")))
    if family is None or not whole:
        return
    names = resolve_names(family, whole, known(family, model.config))
    theirs = {name: whole[stored] for name, stored in names.items()}
    found = _class(family, model, config, theirs)
    if found is None or _there(model, found[0], found[1]):
        return
    headed, answers = found
    for setting, value in headed.hf_labels:
        if said.get(setting, value) != value:
            raise UserError(f"{base}/config.json asks for {setting}={said[setting]!r}; firth has {value!r} only")
    stored = read_tensors(base)
    own = {
        name: stored[name_there]
        for name, name_there in resolve_names(family, stored, known(family, model.config)).items()
    }
    entries = headed.entries(model.config, answers)
    there = own | theirs
    for entry in entries:
        if entry.hf_name not in there:
            raise UserError(
                f"{where}: its head is that of a {headed.name}, of which neither it nor its base {base} has "
                f"{entry.hf_name!r}: that began at random and is lost; name it in peft's modules_to_save and train again"
            )
    for name in [name for name in model.heads if name not in PREFIX_HEADS]:
        del model.heads[name]  # that class has its own head and no other
    model.heads[headed.part] = _filled(headed.make(model.config, answers), headed, entries, there, where)


def _class(
    family: Family, model: LM, config: Mapping[str, Any], whole: Mapping[str, Tensor]
) -> tuple[HeadSpec, int] | None:
    """The class that the adapter was trained in, and how many numbers its head gives; None where it names none of ours."""
    named = (config.get("auto_mapping") or {}).get("base_model_class")
    ends = [end for end, task in TASKS.items() if task == config.get("task_type")]
    for headed in family.heads:
        if headed.name != named and headed.name.rpartition("For")[2] not in ends:
            continue
        last = headed.entries(model.config, 1)[-1].hf_name
        if last in whole and headed.num_outputs in (0, len(whole[last])):
            return headed, len(whole[last])
    return None


def _there(model: LM, headed: HeadSpec, answers: int) -> bool:
    """Whether the model has that head, of those sizes."""
    if headed.part not in model.heads:
        return False
    with init_empty_weights():
        wanted = headed.make(model.config, answers).state_dict()
    mine = model.heads[headed.part].state_dict()
    return {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in wanted.items()}


def _filled(
    module: nn.Module, headed: HeadSpec, entries: list[WeightMapping], there: Mapping[str, Tensor], where: Path
) -> nn.Module:
    front = f"heads.{headed.part}."
    state = {name.removeprefix(front): tensor for name, tensor in from_hf(there, entries).items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as fault:  # torch names every tensor that does not fit
        raise UserError(f"{where}: the head of a {headed.name} in it is of another size than its base") from fault
    return module
