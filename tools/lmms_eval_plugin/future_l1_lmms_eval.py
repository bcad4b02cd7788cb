"""Future-L1 in lmms-eval: its tasks, answer rules and intervals, with a model that imagines. Ours.

    pip install -e tools/lmms_eval_plugin          # beside lmms-eval, in its own environment
    export FUTURE_L1=/path/to/this/repository
    lmms-eval --model future_l1 --model_args pretrained=DIR --tasks videomme --batch_size 4

model_args: pretrained, a model's folder, run's folder or hub id; any setting of `data.DataConfig`
(num_frames, video_max_tokens, system, ...), max_latents and max_new_tokens. What is not given is
what the model was trained with (future_l1.json), as in this project's own scripts.

A task gets the text inside the first closed <answer>, else the whole response without its tags. A
task's own max_new_tokens is raised to ours where it is lower: it counts a bare letter, not the
reasoning before it. A clip that cannot be read is named, and answered with nothing.
"""

import dataclasses
import io
import os
import sys
from itertools import groupby

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm


def find_checkout():
    """Make this project's modules importable. Raises SystemExit without FUTURE_L1.

    They go last: among them is evaluate.py, and lmms-eval needs a package of that name.
    """
    path = os.environ.get("FUTURE_L1", "")
    if not os.path.exists(os.path.join(path, "latent_decode.py")):
        raise SystemExit(f"FUTURE_L1 is {path!r}, expected the folder of the Future-L1 repository")
    if path not in sys.path:
        sys.path.append(path)


find_checkout()

from common.clips import ClipError  # noqa: E402
from common.folder import SHARED, trained_with  # noqa: E402
from common.formats import Clip, Frame, RecordError, Row, Skipped, answer_of  # noqa: E402
from common.machine import Machine  # noqa: E402
from data import DataConfig, collate, encode, model_inputs, to_device  # noqa: E402
from latent_decode import generate  # noqa: E402


def manifest():
    """What the entry point gives lmms-eval."""
    return ModelManifest("future_l1", simple_class_path=f"{__name__}.FutureL1")


class FutureL1(lmms):
    """The interface that lmms-eval asks."""

    is_simple = True

    def __init__(self, pretrained, batch_size=1, max_new_tokens=2048, device=None, **settings):
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # lmms-eval gathers by it
            from accelerate import Accelerator

            self.accelerator = Accelerator()
        trained = trained_with(pretrained)
        inherited = {name: trained[name] for name in SHARED if name in trained}
        chosen = {**inherited, **settings}
        self.max_latents = int(chosen.pop("max_latents", 8))  # official
        self.config = DataConfig(**typed(chosen))
        self.max_new_tokens, self.batch_size = int(max_new_tokens), int(batch_size)
        machine = Machine()
        self._rank, self._world_size, self.device = machine.rank, machine.world, machine.device
        self.model, self.tokenizer = machine.load(pretrained)

    def generate_until(self, requests):
        """Requests (text, generation settings, doc_to_visual, doc id, task, split) -> answers."""
        answers = []
        hidden = self._rank != 0
        with tqdm(total=len(requests), desc="Future-L1", disable=hidden, mininterval=2) as bar:
            # settings hold for a batch
            for _, alike in groupby(requests, lambda request: str(request.args[1])):
                alike = list(alike)
                for i in range(0, len(alike), self.batch_size):
                    block = alike[i : i + self.batch_size]
                    answers += self.answer(block)
                    bar.update(len(block))
        return answers

    def answer(self, requests):
        """Requests of the same generation settings -> their answers."""
        samples = [self.sample(request) for request in requests]
        batch = collate(samples, self.tokenizer.pad_token_id or 0, side="left")
        for where, why in batch["skipped"]:
            tqdm.write(f"skipped {where}: {why}")
        answers = [""] * len(requests)
        if batch["kept"]:
            wanted = requests[0].args[1]
            rollout = generate(
                self.model,
                model_inputs(to_device(batch, self.device)),
                max_new_tokens=max(self.max_new_tokens, wanted.get("max_new_tokens", 0)),
                max_latents=self.max_latents,
                temperature=wanted.get("temperature") or 0.0,
                top_p=wanted.get("top_p") or 1.0,
                generator=torch.Generator().manual_seed(0),
            )
            for i, ids, n in zip(batch["kept"], rollout.tokens, rollout.lengths):
                answers[i] = self.read(ids[:n].tolist(), wanted.get("until", []))
        for request, answer in zip(requests, answers):
            self.cache_hook.add_partial("generate_until", request.args[:2], answer)
        return answers

    def sample(self, request):
        """A request -> its encoded prompt, or a Skipped."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        where, parts = f"{task}:{split}:{doc_id}", []
        for visual in doc_to_visual(self.task_dict[task][split][doc_id]) or []:
            if isinstance(visual, str):
                parts.append(Clip(visual))
            elif hasattr(visual, "convert"):  # one of PIL's
                picture = io.BytesIO()
                visual.convert("RGB").save(picture, "PNG")
                parts.append(Frame(picture.getvalue()))
            else:
                return Skipped(where, f"a visual of type {type(visual).__name__}")
        row = Row(where, where, [*parts, text.replace("<image>", "").strip()], [], "")
        try:
            return encode(row, self.tokenizer, self.config, train=False)
        except (ClipError, RecordError) as e:
            return Skipped(where, str(e))

    def read(self, ids, until):
        """A response's ids -> what the task sees of it."""
        text = self.tokenizer.decode(ids)
        answer = answer_of(text)
        if answer is None:
            answer = self.tokenizer.decode(ids, skip_special_tokens=True)
            for tag in ("<reason>", "</reason>", "<answer>", "</answer>"):
                answer = answer.replace(tag, " ")
        for term in [until] if isinstance(until, str) else until:
            if term.strip():  # not at a blank line, which is the default of many tasks
                answer = answer.split(term)[0]
        return answer.strip()

    def loglikelihood(self, requests):
        raise NotImplementedError("tasks that compare probabilities know no latents")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("one question, one answer")


def typed(settings):
    """model_args -> values of the types of DataConfig's fields. Raises ValueError."""
    types = {field.name: field.type for field in dataclasses.fields(DataConfig)}
    for name in settings:
        if name not in types:
            raise ValueError(f"model_args: {name} is unknown; known are {', '.join(types)}")
    return {name: types[name](value) for name, value in settings.items()}
