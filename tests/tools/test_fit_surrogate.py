"""Surrogates that are fitted, fetched, distilled or exact; on a trained model, where wrong can be told from right."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from fl_split import demo
from fl_split.cli import app
from fl_split.config import Data, Lora, NodeConfig, Train
from fl_split.data.batches import prepare_tokenizer, training_batches
from fl_split.data.load import load_examples
from fl_split.errors import ConfigError, DataError, SurrogateError, TrunkRefused
from fl_split.model import adapters
from fl_split.model.loading import boundaries_of
from fl_split.model.loss import Batch, accumulate
from fl_split.model.slots import trunk_calls_of
from fl_split.model.thin import read_card
from fl_split.model.trunk import LocalTrunk, load_trunk, pull_back, run_trunk
from fl_split.node import train
from fl_split.node.evaluate import evaluate
from fl_split.node.expected import Expected
from fl_split.node.trunk_connection import TrunkConnection
from fl_split.tools.fit.folder import Fit
from fl_split.tools.fit.surrogate import fit
from fl_split.tools.fit.text import read_text, sample_text
from fl_split.tools.gradcheck import Candidate, bottom_gradient, build, gradcheck
from fl_split.trunk import server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers

FIT = Fit(layers=2, steps=40, batch_size=4, length=48, lessons=40)


@pytest.fixture(scope="module")
def fitted(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A surrogate worth 2 of the demo's 4 trunk layers, fitted for a moment."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "public.txt").write_text("\n\n".join(demo.public_text(1, 1000)))
    text = read_text([folder / "public.txt"], demo_model, FIT.length)
    fit(demo_model, 2, 2, text, FIT, folder / "surrogate.safetensors")
    return folder / "surrogate.safetensors"


@pytest.fixture(scope="module")
def batches(demo_model: Path) -> list[Batch]:
    """Private batches of one institution, which no fit has seen."""
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(demo_model))
    node = NodeConfig(data_path=str(demo.data_folder() / "hospital-north.jsonl"))
    examples = load_examples(Data.model_validate({"max-length": 64}), node, tokenizer, 0)
    return list(islice(training_batches(examples.train, tokenizer, 8, 0, 0), 4))


@contextmanager
def served(folder: Path, **changes: Any) -> Iterator[TrunkConnection]:
    config = TrunkConfig.model_validate({"metrics": {"enabled": False}, **changes})
    with server.embedded(hold_layers(folder, 2, 2), config=config) as address:
        with TrunkConnection(address, Expected.from_checkpoint(folder, 2, 2), wire_dtype="float32") as client:
            client.connect()
            yield client


def test_matched_beats_blocks_of_the_same_memory_and_identity_and_exact_are_told_apart(
    demo_model: Path, fitted: Path, batches: list[Batch]
) -> None:
    candidates = [
        Candidate("identity"),
        Candidate("blocks", 2),
        Candidate("matched", matched=fitted),
        Candidate("exact"),
    ]
    identity, blocks, matched, exact = gradcheck(demo_model, 2, 2, batches, candidates)
    assert identity.cosine < 0.9
    assert matched.cosine > blocks.cosine + 0.02
    assert matched.cosine < 0.9999  # the exact one is not what was measured
    assert exact.cosine == pytest.approx(1, abs=1e-5)
    assert exact.norm_ratio == pytest.approx(1, abs=1e-4)
    assert matched.extra_params <= blocks.extra_params  # 2 layers, compute of attention paid for


def test_fit_improves_on_its_start_and_says_so_on_the_card(fitted: Path, demo_model: Path) -> None:
    card = read_card(fitted)
    assert card["gradient-cosine"] > card["gradient-cosine-before"]
    assert (card["first-layer"], card["end-layer"], card["layers"]) == (2, 6, 2)
    expected = Expected.from_checkpoint(demo_model, 2, 2)
    assert (card["config-digest"], card["weights-digest"]) == (expected.config_digest, expected.weights_digest)


@pytest.mark.parametrize("kind", ["blocks", "matched", "identity"])
def test_gradient_is_autograds_through_the_formula(
    demo_model: Path, fitted: Path, batches: list[Batch], kind: str
) -> None:
    """h2 = S(h1) + (T(h1) - S(h1)).detach(), written out in the same model."""
    trunk = LocalTrunk(load_trunk(demo_model, 2, 2))
    candidate = Candidate(kind, 2, fitted if kind == "matched" else None)  # type: ignore[arg-type]
    got = bottom_gradient(build(demo_model, 2, 2, trunk, candidate, Lora()), batches[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fl_split.model.slots.join", lambda surrogate, value: surrogate + (value - surrogate).detach())
        expected = bottom_gradient(build(demo_model, 2, 2, trunk, candidate, Lora()), batches[:1])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    assert got.norm() > 0


def test_matched_client_has_the_full_models_loss(demo_model: Path, fitted: Path, batches: list[Batch]) -> None:
    trunk = LocalTrunk(load_trunk(demo_model, 2, 2))
    losses = [
        evaluate(build(demo_model, 2, 2, trunk, candidate, Lora()), batches)
        for candidate in (Candidate("none"), Candidate("matched", matched=fitted))
    ]
    assert losses[0] == losses[1]


def test_surrogate_is_fetched_from_the_trunk_once_and_checked(
    demo_model: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(demo_model, model={"surrogate": str(fitted)}) as client:
        file = client.fetch_surrogate(tmp_path / "cache")
        assert file.read_bytes() == fitted.read_bytes()
        again = client.fetch_surrogate(tmp_path / "cache")
        assert again == file
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [file.name]


def test_damaged_surrogate_is_not_kept(demo_model: Path, fitted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from fl_split.trunk.published import Published

    monkeypatch.setattr(Published, "piece", lambda self, offset: b"x" * 1000)
    with served(demo_model, model={"surrogate": str(fitted)}) as client:
        with pytest.raises(SurrogateError, match="came damaged"):
            client.fetch_surrogate(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_trunk_without_a_surrogate_says_what_to_do(demo_model: Path, tmp_path: Path) -> None:
    with served(demo_model) as client, pytest.raises(SurrogateError, match=r"publishes none.*surrogate fit"):
        client.fetch_surrogate(tmp_path)


def rewritten(file: Path, out: Path, **changes: Any) -> Path:
    """The same surrogate with another card."""
    with safe_open(file, "pt") as tensors:
        weights = {key: tensors.get_tensor(key) for key in tensors.keys()}
    save_file(weights, out, {"card": json.dumps({**read_card(file), **changes})})
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config-digest": "0" * 64}, "fitted to another model"),
        ({"weights-digest": "0" * 64}, "fitted to another model"),
        ({"first-layer": 1}, "fitted to layers 1 to 5, this run's trunk holds 2 to 5"),
    ],
)
def test_surrogate_of_another_model_or_split_is_refused_on_both_sides(
    demo_model: Path, fitted: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = rewritten(fitted, tmp_path / "other.safetensors", **changes)
    with pytest.raises(SurrogateError, match=message):
        Expected.from_checkpoint(demo_model, 2, 2).check_surrogate(read_card(other))
    with pytest.raises(SurrogateError, match=message), served(demo_model, model={"surrogate": str(other)}):
        pass


def test_file_that_is_no_surrogate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("nothing")
    with pytest.raises(SurrogateError, match="not a fitted surrogate .* 'fl-split surrogate fit'"):
        read_card(tmp_path / "x.safetensors")


def test_impossible_budgets_and_too_little_text_are_refused(demo_model: Path, tmp_path: Path) -> None:
    text = torch.randint(3, 200, (80, 48))
    for layers, message in ((4, "less than the trunk's 4"), (0.05, "too small")):
        with pytest.raises(ConfigError, match=message):
            fit(demo_model, 2, 2, text, Fit(layers=layers, steps=1, length=48), tmp_path / "x")
    (tmp_path / "short.txt").write_text("hello")
    with pytest.raises(DataError, match="too few to fit"):
        read_text([tmp_path / "short.txt"], demo_model, 48)


def test_model_writes_its_own_public_text(demo_model: Path) -> None:
    text = sample_text(demo_model, 6, Fit(length=40, seed=1))
    assert text.shape == (6, 40)
    assert torch.equal(text, sample_text(demo_model, 6, Fit(length=40, seed=1)))
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    assert "Which" in tokenizer.decode(text.flatten())  # the trained model's own kind of text


# --------------------------------------------------------------------------------------------------- distilled


def value_error(model: Any, batches: list[Batch]) -> float:
    """||S(h1) - h2||^2 / ||h2 - h1||^2 as the surrogate stands."""
    distiller = train.make_distiller(model, 1e-9)
    model.train()
    for batch in batches:
        accumulate(model, [batch])
    model.zero_grad(set_to_none=True)
    trunk_calls_of(model.get_base_model()).distiller = None
    return distiller.value_error


def test_distillation_brings_the_surrogate_closer_and_gives_it_to_nobody(
    demo_model: Path, batches: list[Batch]
) -> None:
    trunk = LocalTrunk(load_trunk(demo_model, 2, 2))
    model = build(demo_model, 2, 2, trunk, Candidate("distilled", 2), Lora())
    before = value_error(model, batches[:1])
    config = Train.model_validate({"steps": 20})
    optimizer = train.make_optimizer(model, config)
    train.make_distiller(model, 1e-3)
    train.train_round(model, optimizer, iter(batches * 5), config)
    assert value_error(model, batches[:1]) < 0.9 * before
    names = {group["name"] for group in optimizer.param_groups}
    assert names == {"bottom", "top"}  # the task's optimizer does not hold it
    assert not any(".kept." in name for name in adapters.adapter_state(model))  # nor do replies and exports


def test_labels_do_not_move_a_surrogate_that_is_distilled(demo_model: Path, batches: list[Batch]) -> None:
    """With ends that stand still, all it learns from is the same whatever is to be predicted."""
    still = Train.model_validate({"steps": 3, "bottom-lr": 0.0, "top-lr": 0.0})
    states = []
    for labels in (batches[0]["labels"], batches[0]["input_ids"].roll(1, 1)):
        model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("distilled", 2), Lora())
        distiller = train.make_distiller(model, 1e-3)
        start = distiller.state()
        batch = {**batches[0], "labels": labels}
        train.train_round(model, train.make_optimizer(model, still), iter([batch] * 3), still)
        states.append(distiller.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, start[name]) for name, value in states[0].items())


def observed(demo_model: Path, batches: list[Batch], probe_every: int) -> tuple[Any, tuple[Any, ...], Any]:
    """The distiller of one kept layer after one batch, what it was given, and that layer as a function of h1."""
    model = build(demo_model, 2, 2, LocalTrunk(load_trunk(demo_model, 2, 2)), Candidate("distilled", 1), Lora())
    distiller = train.make_distiller(model, 1e-3, probe_every)
    seen: list[tuple[Any, ...]] = []
    observe = distiller.observe

    def spy(*args: Any) -> None:
        seen.append(args)
        observe(*args)

    distiller.observe = spy  # type: ignore[method-assign]
    model.train()
    accumulate(model, batches[:1])
    base, cut = model.get_base_model().base_model, boundaries_of(model.get_base_model())
    kept = base.get_submodule(cut.layers_path)[cut.first].kept

    def surrogate(start: Tensor) -> Any:
        positions = torch.arange(start.shape[1])[None]
        return kept(start, position_embeddings=base.rotary_emb(start, positions), position_ids=positions)

    return distiller, seen[0], surrogate


def test_distillers_gradient_is_that_of_the_value_error_alone(demo_model: Path, batches: list[Batch]) -> None:
    distiller, (start, _, value, mask, _), surrogate = observed(demo_model, batches, 0)
    real = mask.bool()
    error = (surrogate(start) - value)[real].pow(2).sum() / (value - start)[real].pow(2).sum()
    expected = torch.autograd.grad(error, list(distiller.parameters.values()))
    for got, want in zip(distiller._gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ probes


class SpyingTrunk(LocalTrunk):
    """A trunk in this process that keeps what it is sent."""

    def __init__(self, folder: Path) -> None:
        super().__init__(load_trunk(folder, 2, 2))
        self.sent: list[Tensor] = []

    def start(self, hidden_states: Tensor, *rest: Any) -> Any:
        self.sent.append(hidden_states.clone())
        return super().start(hidden_states, *rest)


def test_probes_say_nothing_that_depends_on_labels_and_are_sent_in_training_only(
    demo_model: Path, batches: list[Batch]
) -> None:
    sent = []
    for labels in (batches[0]["labels"], batches[0]["input_ids"].roll(1, 1)):
        trunk = SpyingTrunk(demo_model)
        model = build(demo_model, 2, 2, trunk, Candidate("distilled", 2), Lora())
        train.make_distiller(model, 1e-3, probe_every=2)
        evaluate(model, batches[:1])
        model.train()
        torch.manual_seed(0)
        accumulate(model, [{**batches[0], "labels": labels}] * 4)
        sent.append(trunk.sent)
    assert len(sent[0]) == 1 + 4 + 2
    assert all(torch.equal(a, b) for a, b in zip(*sent, strict=True))
    start, moved = sent[0][2:4]
    real = batches[0]["attention_mask"].bool()
    step = (moved - start)[real]
    assert 0.02 < (step.norm(dim=-1) / start[real].norm(dim=-1)).median() < 0.1
    assert abs(torch.nn.functional.cosine_similarity(step.flatten(), start[real].flatten(), dim=0)) < 0.05
    assert torch.equal(moved[~real], start[~real])


def test_probes_gradient_is_that_of_the_slopes_error(demo_model: Path, batches: list[Batch]) -> None:
    distiller, (start, _, value, mask, probe), surrogate = observed(demo_model, batches, 1)
    here, there, real = surrogate(start), surrogate(probe.moved), mask.bool()
    wanted = run_trunk(load_trunk(demo_model, 2, 2), probe.moved, mask, None) - value
    error = (here - value)[real].square().sum() / (value - start)[real].square().sum()
    error = error + (there - here - wanted)[real].square().sum() / (wanted - probe.moved + start)[real].square().sum()
    expected = torch.autograd.grad(error, list(distiller.parameters.values()))
    for got, want in zip(distiller._gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_probes_bring_the_bottoms_gradient_closer_to_the_exact_one_than_values_alone(
    demo_model: Path, batches: list[Batch]
) -> None:
    """On batches that were not trained on, for every draw of the probes: of five, 0.38 to 0.50 of it were left."""
    trunk = LocalTrunk(load_trunk(demo_model, 2, 2))
    seen, unseen = batches[:3], batches[3:]
    exact = bottom_gradient(build(demo_model, 2, 2, trunk, Candidate("exact"), Lora()), unseen)
    still = Train.model_validate({"steps": 30, "bottom-lr": 0.0, "top-lr": 0.0})

    def error(probe_every: int, seed: int = 0) -> float:
        model = build(demo_model, 2, 2, trunk, Candidate("distilled", 2), Lora())
        train.make_distiller(model, 1e-3, probe_every)
        torch.manual_seed(seed)
        train.train_round(model, train.make_optimizer(model, still), iter(seen * 10), still)
        return 1 - torch.cosine_similarity(bottom_gradient(model, unseen), exact, dim=0).item()

    values_alone = error(0)
    for seed in range(3):
        assert error(1, seed) < 0.7 * values_alone


# ------------------------------------------------------------------------------------------------------- exact


def test_exact_gradient_over_the_wire_is_the_local_one(demo_model: Path) -> None:
    trunk = load_trunk(demo_model, 2, 2)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 9, trunk.config.hidden_size, generator=generator)
    gradient = torch.randn(hidden.shape, generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 2 + [0] * 7])
    gradient = gradient * mask[..., None]
    with served(demo_model, server={"exact-gradient": True}) as client:
        got = client.vjp(hidden, mask, None, gradient)
    expected = pull_back(trunk, hidden, mask, None, gradient)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)


def test_exact_gradient_is_unimplemented_unless_the_operator_says_so(demo_model: Path) -> None:
    hidden = torch.randn(1, 4, 96)
    with served(demo_model) as client, pytest.raises(TrunkRefused, match=r"server\.exact-gradient=true"):
        client.vjp(hidden, None, None, hidden)


def test_operator_is_told_in_plain_words(demo_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    with served(demo_model, server={"exact-gradient": True}):
        pass
    assert "send dL/dh2, the gradient of their private loss" in caplog.text


# ------------------------------------------------------------------------------------------------ command line


def test_command_line_fits_a_surrogate_and_compares_it_with_the_others(demo_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "surrogate.safetensors"
    fitted = CliRunner().invoke(
        app, ["surrogate", "fit", str(out), "--steps", "2", "--lessons", "2", "--length", "32", "--batch-size", "2"]
    )
    assert fitted.exit_code == 0, fitted.output
    assert read_card(out)["steps"] == 2
    checked = CliRunner().invoke(
        app, ["gradcheck", "--matched", str(out), "--layers", "1", "--batches", "1", "--max-length", "48", "--json"]
    )
    assert checked.exit_code == 0, checked.output
    rows = {row["surrogate"]: row for row in map(json.loads, checked.stdout.splitlines())}
    assert set(rows) == {"identity", "blocks-1", "surrogate.safetensors", "streamed", "exact"}
    for kind in ("streamed", "exact"):
        assert rows[kind]["gradient cosine"] == pytest.approx(1, abs=1e-5)
    assert rows["identity"]["extra MB on the node"] == 0 < rows["surrogate.safetensors"]["extra MB on the node"]
    assert rows["streamed"]["extra MB on the node"] == rows["blocks-1"]["extra MB on the node"]


def test_command_line_names_what_is_wrong(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["gradcheck", "--model", str(tmp_path), "--data", "/data/qa.jsonl"])
    assert missing.exit_code == 1
    assert "no config.json in this folder" in missing.output
    forgotten = CliRunner().invoke(app, ["gradcheck", "--model", str(tmp_path)])
    assert forgotten.exit_code == 1
    assert "the demo's invented data is the demo's: give --data" in " ".join(forgotten.output.split())
