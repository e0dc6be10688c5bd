"""transformers' own `generate` with a cache, across the split: the same tokens as the full model with its own cache."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, Family
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fl_split.config import Lora
from fl_split.errors import SplitError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.slots import Nowhere, in_its_place, trunk_calls_of
from fl_split.model.trunk import LocalTrunk, load_trunk

WITHOUT = {"minimax"}  # keeps a state of its own
BOTTOM, TOP = 1, 2
IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.tensor([[1] * 9, [0] * 3 + [1] * 6, [0] * 7 + [1] * 2])
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"  # till 5.23
COMMON = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "eos_token_id": 2}


class Pair:
    """A full model, and its ends around a trunk."""

    def __init__(self, family: Family, folder: Path) -> None:
        family.save(folder)
        self.full: Any = family.auto.from_pretrained(folder).eval()
        self.trunk = load_trunk(folder, BOTTOM, TOP)
        self.split: Any = load_ends(folder, BOTTOM, TOP, LocalTrunk(self.trunk), surrogate="none")
        for model in (self.full, self.split):
            model.generation_config.eos_token_id = None

    def check(self, ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> Tensor:
        mask = torch.ones_like(ids) if mask is None else mask
        found = []
        for model in (self.full, self.split):
            torch.manual_seed(7)
            found.append(model.generate(ids * mask, attention_mask=mask, **{**COMMON, **options}))
        assert torch.equal(found[0], found[1])
        return found[1]


def passed(pair: "Pair", ids: Tensor, cache: DynamicCache) -> Tensor:
    logits: Tensor = pair.split(ids, use_cache=True, **{CACHE: cache}).logits
    return logits


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(Family("llama", {"max_position_embeddings": 128}), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(
        Family("gemma2", {"head_dim": 8, "sliding_window": 4, "max_position_embeddings": 128}),
        tmp_path_factory.mktemp("gemma2"),
    )


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_greedy_tokens_and_beams_equal_the_full_models(family: Family, tmp_path: Path) -> None:
    pair = Pair(family, tmp_path)
    if family.name in WITHOUT:
        with pytest.raises(SplitError, match=f"{family.model_type} with .*use_cache=False"):
            pair.check(max_new_tokens=2)
        return
    pair.check(mask=PADDED, max_new_tokens=8, eos_token_id=None)
    pair.check(mask=PADDED, max_new_tokens=4, num_beams=2, eos_token_id=None)


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.name)
def test_64_greedy_tokens_equal_the_full_models(family: Family, tmp_path: Path) -> None:
    """With and without padding, and beams."""
    if family.name in WITHOUT:
        return
    changes = {**family.changes, "max_position_embeddings": 128}
    pair = Pair(Family(family.model_type, changes, family.variant), tmp_path)
    out = pair.check(max_new_tokens=64, eos_token_id=None)
    assert out.shape == (3, 73)
    pair.check(mask=PADDED, max_new_tokens=64, eos_token_id=None)
    pair.check(mask=PADDED, max_new_tokens=16, num_beams=3, eos_token_id=None)


@pytest.mark.parametrize("which", ["llama", "windows"])
def test_modes_of_generate(which: str, request: pytest.FixtureRequest) -> None:
    pair: Pair = request.getfixturevalue(which)
    pair.check(mask=PADDED, max_new_tokens=30, do_sample=True, temperature=1.5)
    pair.check(mask=PADDED, max_new_tokens=20, do_sample=True, num_return_sequences=2, top_k=20)
    pair.check(mask=PADDED, max_new_tokens=20, num_beams=4, num_return_sequences=2, length_penalty=0.5)
    pair.check(mask=PADDED, max_new_tokens=15, do_sample=True, num_beams=3, temperature=1.3)
    pair.check(mask=PADDED, max_new_tokens=30)  # some end before others
    repeated = IDS[:1, :3].repeat(1, 5)
    pair.check(repeated, max_new_tokens=40, prompt_lookup_num_tokens=4)
    pair.check(IDS, max_new_tokens=20, prefill_chunk_size=4)


def test_assisted_by_a_draft_model(llama: Pair) -> None:
    """A draft that is right at times and wrong at others: the stream is cropped."""
    draft = copy.deepcopy(llama.full)
    with torch.no_grad():
        draft.lm_head.weight.add_(0.02 * torch.randn(draft.lm_head.weight.shape))
    kept = _watch_truncations(llama)
    llama.check(IDS[:1], max_new_tokens=40, assistant_model=draft)
    assert kept


def _watch_truncations(pair: Pair) -> list[Any]:
    seen: list[Any] = []
    trunk = trunk_calls_of(pair.split).trunk
    open_ = type(trunk).open

    class Watched(LocalTrunk):
        def open(self, packed: Any, room: int) -> Any:
            stream, out = open_(self, packed, room)
            truncate = stream.truncate
            stream.truncate = lambda lengths: (seen.append(list(lengths)), truncate(lengths))[1]
            return stream, out

    trunk_calls_of(pair.split).trunk = Watched(pair.trunk)
    return seen


def test_streamers_and_stops(llama: Pair) -> None:
    class Collect(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None: ...

    class Stop(StoppingCriteria):
        def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            return torch.full((len(ids),), ids.shape[1] >= 15, dtype=torch.bool)

    collected = Collect()
    out = llama.split.generate(IDS[:1], max_new_tokens=20, streamer=collected, **COMMON)
    assert collected.tokens == out[0].tolist()
    out = llama.check(IDS, max_new_tokens=60, stopping_criteria=StoppingCriteriaList([Stop()]), eos_token_id=None)
    assert out.shape[1] == 15


def test_going_on_from_a_returned_cache_after_truncation(llama: Pair) -> None:
    """A conversation: answer, take some of it back, go on."""
    found = []
    for model in (llama.full, llama.split):
        options = {**COMMON, "eos_token_id": None, "return_dict_in_generate": True, "max_new_tokens": 12}
        first = model.generate(IDS, **options)
        cache = first[CACHE]
        cache.crop(-5)
        ids = first.sequences[:, : cache.get_seq_length() + 1]
        found.append(model.generate(torch.cat([ids, IDS[:, :4]], 1), **{CACHE: cache}, **options).sequences)
    assert torch.equal(found[0], found[1])


def test_logits_of_a_pass_with_a_cache_equal_those_without(llama: Pair) -> None:
    with torch.no_grad():
        whole = llama.split(IDS, use_cache=False).logits
        cache = DynamicCache(config=llama.split.config)
        parts = [passed(llama, IDS[:, a:b], cache) for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


class Counted(LocalTrunk):
    """Notes how much room each stream is opened with."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.opened: list[int] = []

    def open(self, packed: Any, room: int) -> Any:
        self.opened.append(room)
        return super().open(packed, room)


def test_more_tokens_than_room_was_made_for(llama: Pair) -> None:
    """Nobody said how many would come: what was sent is sent again into more room."""
    trunk = Counted(llama.trunk)
    ids = torch.randint(3, 99, (2, 120), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), in_its_place(llama.split, trunk):
        cache = DynamicCache(config=llama.split.config)
        parts = [passed(llama, ids[:, i : i + 10], cache) for i in range(0, 120, 10)]
        torch.testing.assert_close(torch.cat(parts, 1), llama.full(ids).logits, rtol=1e-3, atol=1e-3)
    assert trunk.opened == [74, 160]


def test_room_is_what_generate_may_make(llama: Pair) -> None:
    trunk = Counted(llama.trunk)
    with in_its_place(llama.split, trunk):
        llama.split.generate(IDS, max_new_tokens=20, **COMMON)
        llama.split.generate(IDS, max_new_tokens=20, num_beams=2, **COMMON)
    assert trunk.opened == [29, 29]


def test_an_adapter_is_used(llama: Pair, tmp_path: Path) -> None:
    model = adapters.attach(
        load_ends(Path(llama.full.config._name_or_path), BOTTOM, TOP, LocalTrunk(llama.trunk), surrogate="identity"),
        Lora(),
        train_bottom=True,
        seed=0,
    ).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapters.export(model, tmp_path, str(llama.full.config._name_or_path), "", "a card")
    full = PeftModel.from_pretrained(copy.deepcopy(llama.full), tmp_path).eval()
    options = {"max_new_tokens": 64, **COMMON, "eos_token_id": None, "attention_mask": PADDED}
    expected = full.generate(input_ids=IDS * PADDED, **options)
    assert torch.equal(model.generate(input_ids=IDS * PADDED, **options), expected)
    assert not torch.equal(llama.full.generate(IDS * PADDED, **options), expected)


# ------------------------------------------------------------------------------------------------------- refusals


def test_streams_are_closed_with_their_caches(llama: Pair) -> None:
    followers = trunk_calls_of(llama.split).streams._followers
    llama.split.generate(IDS, max_new_tokens=3, **COMMON)
    assert not list(followers)


def refused(pair: Pair, match: str, **options: Any) -> None:
    with pytest.raises(SplitError, match=match):
        pair.split.generate(IDS, max_new_tokens=3, **{**COMMON, **options})


def test_other_caches_are_refused(llama: Pair) -> None:
    refused(llama, "llama with StaticCache: only the dynamic cache", cache_implementation="static")


def test_a_trunk_that_keeps_nothing_is_refused(llama: Pair) -> None:
    with in_its_place(llama.split, Nowhere()):
        refused(llama, "Nowhere keeps no keys and values")


def test_a_copied_cache_is_refused(llama: Pair) -> None:
    with torch.no_grad():
        cache = DynamicCache(config=llama.split.config)
        passed(llama, IDS, cache)
        with pytest.raises(SplitError, match="or is a copy"):
            passed(llama, IDS[:, :1], copy.deepcopy(cache))


def test_padding_on_the_right_is_refused(llama: Pair) -> None:
    with torch.no_grad(), pytest.raises(SplitError, match="needs it on the left"):
        llama.split(IDS, attention_mask=PADDED.flip(1), use_cache=True)


def test_gradients_are_refused(llama: Pair) -> None:
    embeds: PreTrainedModel = llama.split.get_input_embeddings()
    embeds.requires_grad_(True)
    try:
        with pytest.raises(SplitError, match="no gradient through a cache"):
            llama.split(IDS, use_cache=True)
    finally:
        embeds.requires_grad_(False)
