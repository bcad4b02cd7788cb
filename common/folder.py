"""A model's folder: where it is, and what lies in it beside the weights. Ours.

future_l1.json              what the model was trained with; every script starts from it
preprocessor_config.json    and other files of the processors, from the folder it started from:
                            others (AutoProcessor, vLLM, lmms-eval) need them
trainer/                    optimizer and random state of a run's checkpoint
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil

from transformers.utils import cached_file

SETTINGS = "future_l1.json"
# what the model sees and may do: trained with it, it is asked with it
SHARED = (
    "system",
    "num_frames",
    "image_max_tokens",
    "video_max_tokens",
    "l_max",
    "max_latents",
    "show_options",
)
PROCESSORS = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
PROCESSOR, VIDEO_PROCESSOR = "Qwen3VLProcessor", "Qwen3VLVideoProcessor"
CELL_PIXELS = 32 * 32  # of a token
# the layout of data.py, as a template for others
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if 'image' in part or part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'video' in part or part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MB = 2**20


def checkpoints(folder):
    """The complete step_* folders of a run, oldest first. Half-written ones have another name."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step_*"))
    complete = [path for path in paths if path.rsplit("_", 1)[1].isdigit()]
    return sorted(complete, key=lambda path: int(path.rsplit("_", 1)[1]))


def newest(folder):
    """A model's folder or hub id as it is; a run's folder -> its newest checkpoint.

    Raises SystemExit if it is empty, is a path where nothing is, or is a folder without a model.
    """
    if not folder:
        raise SystemExit("--model is missing: a model's folder, a run's folder or a hub id")
    if not os.path.isdir(folder):
        if not is_hub_id(folder):
            raise SystemExit(f"{folder}: no such folder")
        return folder
    path = (checkpoints(folder) or [folder])[-1]
    if not os.path.exists(os.path.join(path, "config.json")):
        raise SystemExit(f"{folder}: no model in this folder (neither config.json nor step_N)")
    return path


def is_hub_id(name):
    """Whether a name that is no folder here may be one of the hub's: one slash at most.

    What would lie in a folder that is here, or in runs/, is a path that is mistyped.
    """
    first = name.split("/")[0]
    here = "/" in name and (first == "runs" or os.path.isdir(first))
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not here


@contextlib.contextmanager
def one_line_if_missing(name):
    """Turns the OSError of a model that cannot be found into a SystemExit of one line."""
    try:
        yield
    except OSError as e:
        place = "" if os.path.isdir(name) else "no such folder, and the hub does not give it: "
        raise SystemExit(f"{name}: no model there ({place}{str(e).strip().splitlines()[0]})") from e


def model_fingerprint(folder):
    """What a model's folder or hub id holds -> hash.

    config.json as a whole; of each weight file its name, its size, its first and its last MB. So a
    folder of 16 GB takes no longer than one of 16 MB, and a change in the middle of a file alone is
    not seen. Raises SystemExit if there is no such model.
    """
    with one_line_if_missing(folder):
        config = cached_file(folder, "config.json")
    digest = hashlib.sha256()
    for name in sorted(os.listdir(os.path.dirname(config))):
        if name != "config.json" and not name.endswith((".safetensors", ".bin")):
            continue
        with open(os.path.join(os.path.dirname(config), name), "rb") as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(f"{name} {size}".encode())
            f.seek(0)
            digest.update(f.read(MB))
            f.seek(max(0, size - MB))
            digest.update(f.read(MB))
    return digest.hexdigest()


# --------------------------------------------------------------- what it was trained with, and more


def file_of(model, name):
    """A file of a model's folder or hub id -> its path here, or None if it has none."""
    if os.path.isdir(model):
        path = os.path.join(model, name)
        return path if os.path.exists(path) else None
    silent = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{what}": False for what in silent}
    return cached_file(model, name, **options)


def trained_with(model):
    """What a model's folder, run's folder or hub id was trained with -> its future_l1.json, or {}.

    Raises SystemExit if the file cannot be read.
    """
    if os.path.isdir(model):
        model = (checkpoints(model) or [model])[-1]
    elif not is_hub_id(model):
        return {}
    path = file_of(model, SETTINGS)
    return read_json(path) if path else {}


def read_json(path):
    """A file that holds a JSON object -> dict. Raises SystemExit if it holds anything else."""
    with open(path, encoding="utf-8") as f:
        try:
            value = json.load(f)
        except ValueError as e:
            raise SystemExit(f"{path}: not JSON ({e})") from e
    if not isinstance(value, dict):
        raise SystemExit(f"{path}: expected an object, found {type(value).__name__}")
    return value


def describe_training(config, start, resumed, **facts):
    """The future_l1.json of a model that `config` trains from the folder or hub id `start`.

    The settings it has in common with every script; `base`, where the first training began; a list
    of the trainings. facts: of this training, the last. resumed: `start` is a checkpoint of it.
    """
    before = trained_with(start)
    settings = {name: getattr(config, name) for name in SHARED if hasattr(config, name)}
    settings.setdefault("max_latents", 2 * config.l_max)  # official
    earlier = before.get("trainings", [])
    this = dict(facts, data=os.path.basename(config.data))
    trainings = [*(earlier[:-1] if resumed else earlier), this]
    base = before.get("base", plain_name(config.model))
    return dict(settings, base=base, trainings=trainings, scores={})


def add_scores(model, name, scores):
    """Note in a model's folder what it scored on `name`, if it is ours and can be written."""
    path = os.path.join(model, SETTINGS)
    if not os.access(path, os.W_OK):
        return
    about = trained_with(model)
    figures = ("n", "accuracy", "strict", "official", "chain", "answer", "average")
    about.setdefault("scores", {})[name] = {k: scores[k] for k in figures if k in scores}
    write_settings(path, about)


def write_settings(path, about):
    """Write a future_l1.json as a whole or not at all."""
    with open(path + ".part", "w", encoding="utf-8") as f:
        json.dump(about, f, indent=1, ensure_ascii=False)
    os.replace(path + ".part", path)


def plain_name(model):
    """A hub id as it is, of a folder its name: what others may read."""
    return os.path.basename(os.path.normpath(model)) if os.path.isdir(model) else model


def own_processors(settings):
    """{file: text}: Qwen3-VL's processors, with the pixel budgets of `settings`; the template."""
    shared = dict(patch_size=16, temporal_patch_size=2, merge_size=2, processor_class=PROCESSOR)
    shared.update(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    image_cells = settings.get("image_max_tokens", 256)
    video_cells = 2 * settings.get("video_max_tokens", 4096)  # a token covers two frames
    texts = {"chat_template.jinja": CHAT}
    for file, kind, name, cells in (
        ("preprocessor_config.json", "image_processor_type", "Qwen2VLImageProcessor", image_cells),
        ("video_preprocessor_config.json", "video_processor_type", VIDEO_PROCESSOR, video_cells),
    ):
        size = dict(shortest_edge=CELL_PIXELS, longest_edge=cells * CELL_PIXELS)
        texts[file] = json.dumps({kind: name, "size": size, **shared}, indent=1)
    return texts


def complete(folder, start, settings):
    """Put into a saved model's folder what others need: `settings`, and the processors of `start`.

    start: the folder or hub id that the model was made from; what it lacks is written as this
    project reads pictures and lays out a chat. A file that the tokenizer has written is left.
    """
    for name in PROCESSORS:
        source = file_of(start, name)
        if source and not os.path.exists(os.path.join(folder, name)):
            shutil.copyfile(source, os.path.join(folder, name))
    own = own_processors(settings)
    if {"chat_template.json", "chat_template.jinja"} & set(os.listdir(folder)):
        del own["chat_template.jinja"]
    for name, text in own.items():
        if not os.path.exists(os.path.join(folder, name)):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
                f.write(text)
    write_settings(os.path.join(folder, SETTINGS), settings)
