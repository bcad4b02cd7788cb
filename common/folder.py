"""A model's folder: where to find it, and what it holds besides the weights.

future_l1.json              what the model was trained with; every script takes its defaults here
custom_generate/            common/custom_generate.py: with it transformers' `generate` imagines
preprocessor_config.json    and video_preprocessor_config.json, with which AutoProcessor, vLLM and
                            lmms-eval show the model what this project would show it
chat_template.jinja         or .json: the base model's, else this project's own
painter/                    turns latents into pixels, if common/painter.py has taught one
trainer/                    optimizer and random state, in a run's checkpoint
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
# how the model is asked: it should be asked as it was trained
SHARED = ("system", "num_frames", "image_max_tokens", "video_max_tokens", "l_max", "max_latents")
SHARED += ("show_options",)
TEMPLATES = ("chat_template.json", "chat_template.jinja")
TOKEN_PIXELS = 32 * 32  # what one visual token covers
# the chat layout of data.py as a Jinja template
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if 'image' in part or part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif 'video' in part or part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\
{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MB = 2**20


def checkpoints(folder):
    """The step_* folders of a run, oldest first. A half-written one still has another name."""
    paths = glob.glob(os.path.join(glob.escape(folder), "step_*"))
    complete = [path for path in paths if path.rsplit("_", 1)[1].isdigit()]
    return sorted(complete, key=lambda path: int(path.rsplit("_", 1)[1]))


def newest(folder):
    """A run's folder -> its newest checkpoint; a model's folder or a hub id stays as it is.

    Raises SystemExit for an empty name, a path that does not exist, and a folder without a model.
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
    """Whether a name that is not a local folder can be a hub id, which has at most one slash.

    A name below runs/ or below a local folder is treated as a mistyped path.
    """
    first = name.split("/")[0]
    here = "/" in name and (first == "runs" or os.path.isdir(first))
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not here


@contextlib.contextmanager
def one_line_if_missing(name):
    """Turn the OSError for a model that cannot be found into a SystemExit of one line."""
    try:
        yield
    except OSError as e:
        place = "" if os.path.isdir(name) else "no such folder, and the hub does not give it: "
        raise SystemExit(f"{name}: no model there ({place}{str(e).strip().splitlines()[0]})") from e


def model_fingerprint(folder):
    """A model's folder -> a hash of its config.json and weights; a hub id -> its commit.

    Of each weight file the name, the size, the first MB and the last MB are hashed, so that 16 GB
    take no longer than 16 MB. A change in the middle of a file alone goes unnoticed. Raises
    SystemExit if there is no such model.
    """
    with one_line_if_missing(folder):
        config = cached_file(folder, "config.json")
    if not os.path.isdir(folder):  # the weights may not be downloaded yet
        return os.path.basename(os.path.dirname(config))  # the hub's cache names folders by commit
    digest = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name != "config.json" and not name.endswith((".safetensors", ".bin")):
            continue
        with open(os.path.join(folder, name), "rb") as f:
            size = f.seek(0, os.SEEK_END)
            digest.update(f"{name} {size}".encode())
            f.seek(0)
            digest.update(f.read(MB))
            f.seek(max(0, size - MB))
            digest.update(f.read(MB))
    return digest.hexdigest()


# ------------------------------------------------------------------ what the model was trained with


def file_of(model, name):
    """A file in a model's folder or hub id -> its local path, or None if there is none."""
    silent = ("missing_entries", "connection_errors", "gated_repo")
    return cached_file(model, name, **{f"_raise_exceptions_for_{what}": False for what in silent})


def trained_with(model):
    """The future_l1.json of a model's folder, a run's folder or a hub id as a dict; {} if none.

    Raises SystemExit if the file is not JSON.
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

    It holds the settings that all scripts share; `base`, the model that the first training began
    with; and a list of all trainings. facts: what is recorded of this training, the last in the
    list. resumed: `start` is a checkpoint of this training.
    """
    before = trained_with(start)
    settings = {name: getattr(config, name) for name in SHARED if hasattr(config, name)}
    settings.setdefault("max_latents", 2 * config.l_max)  # official
    earlier = before.get("trainings", [])
    this = dict(facts, data=os.path.basename(config.data))
    trainings = [*(earlier[:-1] if resumed else earlier), this]
    # a local folder is recorded by its name alone, because its path is private
    local = os.path.isdir(config.model)
    name = os.path.basename(os.path.normpath(config.model)) if local else config.model
    return dict(settings, base=before.get("base", name), trainings=trainings)


def own_processors(settings):
    """{file: text} of Qwen3-VL's processors with frames and pixel budgets of `settings`, and CHAT.

    A released model's own files would ask otherwise: two frames a second and larger pictures.
    """
    shared = dict(patch_size=16, temporal_patch_size=2, merge_size=2)
    shared.update(image_mean=[0.5] * 3, image_std=[0.5] * 3, processor_class="Qwen3VLProcessor")
    images = dict(shared, image_processor_type="Qwen2VLImageProcessor")
    images["size"] = pixels(settings.get("image_max_tokens", 256))
    videos = dict(shared, video_processor_type="Qwen3VLVideoProcessor")
    videos["size"] = pixels(2 * settings.get("video_max_tokens", 4096))  # a token covers two frames
    videos.update(num_frames=settings.get("num_frames", 16), fps=None, cap_pixels_per_frame=False)
    return {
        "chat_template.jinja": CHAT,
        "preprocessor_config.json": json.dumps(images, indent=1),
        "video_preprocessor_config.json": json.dumps(videos, indent=1),
    }


def pixels(tokens):
    """The size of a picture of at most `tokens` visual tokens, as processors write it."""
    return dict(shortest_edge=TOKEN_PIXELS, longest_edge=tokens * TOKEN_PIXELS)


def complete(folder, start, settings):
    """Add to the folder of a saved model what others need to use it.

    `settings` become its future_l1.json. The processors take frames and pixel budgets from them.
    max_latents also goes into config.json, where custom_generate reads it. start: the folder or hub
    id that the model was made from. Its chat template is copied, unless the tokenizer has written
    one. A model whose config names the code that decodes it (`decoded_by`) gets no custom_generate.
    """
    texts = own_processors(settings)
    for name in TEMPLATES:
        source = file_of(start, name)
        if source and not os.path.exists(os.path.join(folder, name)):
            shutil.copyfile(source, os.path.join(folder, name))
    if set(TEMPLATES) & set(os.listdir(folder)):
        del texts["chat_template.jinja"]

    config = read_json(os.path.join(folder, "config.json"))
    if not config.get("decoded_by"):
        os.makedirs(os.path.join(folder, "custom_generate"), exist_ok=True)
        target = os.path.join(folder, "custom_generate", "generate.py")
        shutil.copyfile(os.path.join(os.path.dirname(__file__), "custom_generate.py"), target)
    if "max_latents" in settings:
        config["max_latents"] = settings["max_latents"]
        texts["config.json"] = json.dumps(config, indent=1)
    texts[SETTINGS] = json.dumps(settings, indent=1, ensure_ascii=False)
    for name, text in texts.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(text)
