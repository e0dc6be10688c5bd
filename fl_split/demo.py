"""The embedded default: a tiny base model that is really trained, and private data of two institutions.

Both are built on the first call and cached. They are an ordinary Hugging Face folder and ordinary JSONL files: the rest
of the product reads them as it reads a user's own. The public text is clinic records with questions about them, and
remarks on birds. The institutions write the same records in code, a bird's name for each illness, and answer in their
own style. The codes of one contradict those of the other, so that an adapter helps its owner only. Whoever reads the
code early (in the bottom) can leave the rest to what the trunk already knows.
"""

import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fl_split.files import cache_folder

logger = logging.getLogger(__name__)

VERSION = "demo-v1"  # a folder of its own: raise it whenever anything below changes what is built
INSTITUTIONS = ("hospital-north", "hospital-south")
EXAMPLES = 360  # of each institution
STEPS, BATCH, LENGTH = 320, 16, 64  # optimizer steps, sequences of one step, tokens of one sequence

ILLNESSES = {  # illness: (medicine, clinic); the medicines are invented
    "asthma": ("veltrin", "lung"),
    "gout": ("corazil", "joint"),
    "measles": ("dapsol", "skin"),
    "anemia": ("ferrox", "blood"),
    "migraine": ("nomigan", "nerve"),
    "eczema": ("lanolex", "skin"),
    "croup": ("tusmol", "lung"),
    "arthritis": ("movilan", "joint"),
    "reflux": ("gastrin", "stomach"),
    "ulcer": ("pepzol", "stomach"),
    "angina": ("cardol", "heart"),
    "vertigo": ("balanz", "nerve"),
}
FLOORS = dict(
    lung="second", joint="first", skin="fifth", blood="third", nerve="sixth", stomach="fourth", heart="eighth"
)
FORMS = dict(baby="drops", child="syrup", adult="tablets", elder="powder")  # age: form of the medicine
NAMES = "Anna Paul Mia Omar Lena Igor Sara Tom Nina Ravi Eva Hugo".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday".split()
BIRDS = "heron wren finch owl robin crow swan stork lark gull raven dove".split()
PLACES = "river pond hill field forest garden shore tower".split()
COLOURS = "grey brown green white red black blue yellow".split()
STYLES = {  # institution: (how it writes a record, how it answers)
    "hospital-north": ("{name}, {age}, has {illness}, seen on {day}.", "At north it is {answer}."),
    "hospital-south": ("Seen on {day}: {name}, {age}, with {illness}.", "We say {answer} here."),
}


def model_folder(cache: Path | None = None) -> Path:
    """Return the folder of the demo base model, trained on the first call (one to two minutes).

    Args:
        cache: Folder to keep it in; by default the user's cache folder (``$XDG_CACHE_HOME`` or ``~/.cache``).
    """
    return _cached("model", _build_model, cache)


def data_folder(cache: Path | None = None) -> Path:
    """Return the folder of the demo's private data: one JSONL file per institution, `question` and `answer` a line.

    Args:
        cache: As for `model_folder`.
    """
    return _cached("data", _build_data, cache)


def public_text(seed: int, num_sentences: int) -> list[str]:
    """Return short passages of the text that the base model was trained on.

    Args:
        seed: The same seed gives the same passages.
        num_sentences: How many passages; each stands alone, and those with a record have several sentences.
    """
    rng = random.Random(f"public {seed}")
    return [_record(rng) if rng.random() < 0.8 else _remark(rng) for _ in range(num_sentences)]


def private_examples(institution: str, seed: int = 0, num_examples: int = EXAMPLES) -> list[dict[str, str]]:
    """Return an institution's question/answer pairs.

    Args:
        institution: One of `INSTITUTIONS`.
        seed: Chooses the patients; the institution's codes, wards and style are its own and do not depend on it.
        num_examples: How many pairs.
    """
    own = random.Random(institution)
    codes = dict(zip(ILLNESSES, own.sample(BIRDS, len(ILLNESSES)), strict=True))
    wards = {illness: f"{own.choice(COLOURS)} {own.choice(PLACES)}" for illness in ILLNESSES}
    record, style = STYLES[institution]
    rng = random.Random(f"{institution} {seed}")
    examples = []
    for _ in range(num_examples):
        name, age, illness, day = _patient(rng)
        pairs = [*_questions(age, illness), ("Which ward?", f"the {wards[illness]} ward")]
        question, answer = rng.choice(pairs)
        written = record.format(name=name, age=age, illness=codes[illness], day=day)
        examples.append({"question": f"{written} {question}", "answer": style.format(answer=answer)})
    return examples


def _patient(rng: random.Random) -> tuple[str, str, str, str]:
    return rng.choice(NAMES), rng.choice(list(FORMS)), rng.choice(list(ILLNESSES)), rng.choice(DAYS)


def _questions(age: str, illness: str) -> list[tuple[str, str]]:
    """What can be asked about a record: read off it, or looked up in one, two (floor) or joint (medicine) steps."""
    medicine, clinic = ILLNESSES[illness]
    return [
        ("Which medicine?", f"{medicine} {FORMS[age]}"),
        ("Which clinic?", f"the {clinic} clinic"),
        ("Which floor?", f"the {FLOORS[clinic]} floor"),
        ("Which illness?", illness),
    ]


def _record(rng: random.Random) -> str:
    name, age, illness, day = _patient(rng)
    record = rng.choice(
        (
            f"{name}, {age}, has {illness}, seen on {day}.",
            f"Seen on {day}: {name}, {age}, with {illness}.",
            f"On {day} we saw {name}, {age}, for {illness}.",
        )
    )
    between = rng.choice(("\n", " "))
    asked = rng.sample(_questions(age, illness), 4)
    return between.join([record, *(f"{question}{between}{answer}." for question, answer in asked)])


def _remark(rng: random.Random) -> str:
    """Say where a bird lives, or which colour it has; the verb agrees with the first noun, not with the nearest."""
    index = rng.randrange(len(BIRDS))
    bird, colour = BIRDS[index], COLOURS[index * 3 % len(COLOURS)]
    if rng.random() < 0.5:
        return f"The {bird} by the {PLACES[index * 5 % len(PLACES)]} is {colour}."
    subject, verb = rng.choice(((bird, "is"), (f"{bird}s", "are")))
    other = rng.choice(BIRDS) + rng.choice(("", "s"))
    return f"The {subject} near the {other} {verb} {colour}."


def _cached(name: str, build: Callable[[Path], None], cache: Path | None) -> Path:
    """Return the finished folder, built first if there is none: under a lock, beside it, then renamed to it."""
    root = (cache or cache_folder()) / VERSION
    folder = root / name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        if folder.is_dir():  # another process built it while this one waited
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
        try:
            build(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _build_data(folder: Path) -> None:
    for institution in INSTITUTIONS:
        lines = (json.dumps(example) + "\n" for example in private_examples(institution))
        (folder / f"{institution}.jsonl").write_text("".join(lines), encoding="utf-8")


def _build_model(folder: Path) -> None:
    logger.info("training the demo base model, once: one to two minutes")
    start = time.monotonic()
    texts = public_text(seed=0, num_sentences=STEPS * BATCH * LENGTH // 24)
    tokenizer = _train_tokenizer(texts)
    ids = [i for text in tokenizer(texts)["input_ids"] for i in (*text, tokenizer.eos_token_id)]
    batches = torch.tensor(ids[: len(ids) // (BATCH * LENGTH) * BATCH * LENGTH]).view(-1, BATCH, LENGTH)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed the caller's GPUs too
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=8,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.06,  # the usual 0.02 leaves attention at this width nearly uniform for most of the run
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices are small: on a busy machine more threads wait for each other
        try:
            loss = _train_model(model, batches)
        finally:
            torch.set_num_threads(num_threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logger.info("trained the demo base model in %.0f s: loss %.2f", time.monotonic() - start, loss)


def _train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which a word has the same tokens after a space, after a newline and at the start."""
    pieces = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(pieces)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace(" \n ", "\n"), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts[:4000], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=256
    )


def _train_model(model: LlamaForCausalLM, batches: torch.Tensor) -> float:
    """Train in place on batches `[step, batch, seq]` of token ids; returns the mean loss of the last 20 steps, in nats.

    Matrices are stepped along their orthogonalised momentum (Muon, K. Jordan et al. 2024), here in float32: in the same
    time it learns to look things up in the record, which AdamW alone had hardly begun.
    """
    layers = model.model.layers
    groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in layers.parameters():
        if parameter.dim() == 2:
            groups.setdefault(parameter.shape, []).append(parameter)
    momenta = {shape: torch.zeros(len(group), *shape) for shape, group in groups.items()}
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "embed" in n]
    adam = torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step, ids in enumerate(batches[:STEPS]):
        rate = min(1.0, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / STEPS)) / 2)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = 5e-3 * rate
        adam.step()
        for shape, group in groups.items():
            _muon_step(group, momenta[shape], 0.01 * rate)
        model.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@torch.no_grad()
def _muon_step(group: list[torch.nn.Parameter], momentum: torch.Tensor, rate: float) -> None:
    """Step matrices of one shape, in place, with their momentum `[matrix, rows, columns]`, also in place."""
    gradient = torch.stack([p.grad for p in group if p.grad is not None])
    momentum.mul_(0.9).add_(gradient)
    update = gradient + 0.9 * momentum
    update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(4):  # Newton-Schulz: brings the singular values near 1
        square = update @ update.mT if update.shape[1] <= update.shape[2] else update.mT @ update
        square = -4.7750 * square + 2.0315 * square @ square
        update = 3.4445 * update + (square @ update if update.shape[1] <= update.shape[2] else update @ square)
    size = 0.2 * max(update.shape[1:]) ** 0.5  # the step of an AdamW at the same rate
    for parameter, direction in zip(group, update, strict=True):
        parameter.mul_(1 - 0.01 * rate).add_(direction, alpha=-rate * size)
