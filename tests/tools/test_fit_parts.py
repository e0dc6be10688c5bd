"""A fit of a surrogate in its parts: what it records, how it goes on after a kill, what it says beforehand."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, BertConfig, BertForSequenceClassification, LlamaConfig

from fl_split.config import Lora
from fl_split.errors import ConfigError, DataError, TrainingError
from fl_split.model import adapters
from fl_split.model.ends import load_ends
from fl_split.model.loading import Boundaries, boundaries_of
from fl_split.model.loss import IGNORED
from fl_split.model.thin import linears, read_card
from fl_split.model.trunk import LocalTrunk, load_trunk
from fl_split.tools.fit.cost import Cost
from fl_split.tools.fit.folder import Fit, FitFolder, Stage, save_tensors
from fl_split.tools.fit.lessons import Batches, load_teacher, observe, record_lessons
from fl_split.tools.fit.moments import cut_layers, moments_of, thin_product
from fl_split.tools.fit.surrogate import fit
from fl_split.tools.fit.text import draw, question

FIT = Fit(layers=2, steps=12, batch_size=4, length=16, lessons=12)


def text(vocab_size: int = 99, num_sequences: int = 48) -> Tensor:
    return torch.randint(vocab_size, (num_sequences, FIT.length), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_thin_product_is_the_one_from_symmetric_roots(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    x, g = (torch.randn(n, 4 * n, generator=generator) for n in reversed(shape))
    x, g = x @ x.T / len(x), g @ g.T / len(g)

    def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(moment.double())
        return (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T

    (x_root, x_inverse), (g_root, g_inverse) = roots(x), roots(g)
    u, s, v = torch.linalg.svd(g_root @ weight.double() @ x_root, full_matrices=False)
    a, b, got = thin_product(weight, x, g)
    torch.testing.assert_close(got, s, rtol=1e-6, atol=1e-6)
    for rank in (1, 5, min(shape)):
        expected = (g_inverse @ u[:, :rank] * s[:rank]) @ (v[:rank] @ x_inverse)
        torch.testing.assert_close(b[:, :rank] @ a[:rank], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_of_one_layer_at_a_time_are_those_of_the_whole_pass(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    teacher = load_teacher(checkpoint(family), 1, 1, FIT)
    cut, got = boundaries_of(teacher), {}

    def spy(layer: Any, *rest: Any) -> Any:
        moments, gradients = moments_of(layer, *rest)
        got[layer] = moments
        return moments, gradients

    monkeypatch.setattr("fl_split.tools.fit.moments.moments_of", spy)
    budget = Cost.of(teacher.config, cut, FIT)[1]
    cut_layers(teacher, text(), budget, FIT, FitFolder(tmp_path / "x", {}))

    layers = teacher.base_model.get_submodule(cut.layers_path)
    sums: dict[tuple[int, str, int], Tensor] = {}

    def listen(i: int, name: str) -> Any:
        def add(place: int, rows: Tensor) -> None:
            rows = rows.detach().flatten(0, -2)
            sums[i, name, place] = sums.get((i, name, place), torch.zeros(())) + rows.T @ rows

        def hook(module: Any, args: Any, out: Tensor) -> None:
            add(0, args[0])
            out.register_hook(lambda gradient: add(1, gradient))

        return hook

    for i in cut.trunk:
        for name, module in linears(layers[i]).items():
            module.register_forward_hook(listen(i, name))
    batches = Batches(teacher, FIT)
    for b in range(len(text()) // FIT.batch_size):
        observe(teacher, cut, *batches.draw(text(), b, 0, random_tokens=True))
    assert len(sums) == 2 * sum(len(moments) for moments in got.values()) > 0
    for (i, name, place), expected in sums.items():
        torch.testing.assert_close(got[layers[i]][name][place], expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert not list((tmp_path / "x.unfinished").glob("inputs-*"))


def test_ranks_pay_for_themselves_and_no_linear_has_fewer_than_the_least(checkpoint: Callable[[str], Path]) -> None:
    config = AutoConfig.from_pretrained(checkpoint("llama"))
    budget = Cost.of(config, Boundaries("layers", 6, 1, 5), FIT)[1]
    generator = torch.Generator().manual_seed(0)
    energies = {
        (i, n): torch.rand(32, generator=generator).sort(descending=True)[0]
        for i in budget.shapes
        for n in budget.shapes[i]
    }
    ranks = budget.choose(energies)
    cost = {(i, n): sum(budget.shapes[i][n]) for i, n in ranks}
    spent = sum(cost[key] * rank for key, rank in ranks.items())
    assert budget.numbers - max(cost.values()) < spent <= budget.numbers
    assert min(ranks.values()) >= 4
    kept = [float(energies[key][rank - 1]) / cost[key] for key, rank in ranks.items() if rank > 4]
    left = [float(energies[key][rank]) / cost[key] for key, rank in ranks.items() if rank < 32]
    assert min(kept) >= max(left) - 1e-3


# -------------------------------------------------------------------------------------------------------- batches


def test_batches_follow_from_their_numbers_and_an_epoch_holds_all_text() -> None:
    public = torch.arange(24)[:, None] * torch.ones(16, dtype=torch.long)
    batches = [draw(public, 4, number, seed=0) for number in range(12)]
    for epoch in (batches[:6], batches[6:]):
        assert sorted(int(ids[row, 0]) for ids, _ in epoch for row in range(4)) == list(range(24))
    assert [b[0].tolist() for b in batches[:6]] != [b[0].tolist() for b in batches[6:]]
    again = draw(public, 4, 7, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again, batches[7], strict=True))
    assert any((labels[:, 0] == IGNORED).any() for _, labels in batches)
    for ids, labels in batches:
        assert ((labels == ids) | (labels == IGNORED)).all()
    noisy, _ = draw(public, 24, 0, seed=0, random_tokens=torch.tensor([50, 70]))
    rows = (noisy >= 24).float().mean(1)
    assert (rows == 0).any() and (rows > 0.1).any()
    assert set(noisy[noisy >= 24].tolist()) == {50, 70}


def test_random_tokens_are_none_that_the_model_never_saw(checkpoint: Callable[[str], Path]) -> None:
    """Of a token that is nearly 0, seen by itself alone, the gradient grows a thousandfold with every layer."""
    teacher = load_teacher(checkpoint("llama"), 1, 1, FIT)
    teacher.get_input_embeddings().weight[60:] *= 1e-6
    batches = Batches(teacher, FIT)
    drawn = torch.cat([batches.draw(torch.full((8, 16), 3), number, 0, random_tokens=True)[0] for number in range(20)])
    assert len(drawn.unique()) > 20 and drawn.max() < 60


def test_a_classifiers_labels_are_answered_by_its_text() -> None:
    ids = text()
    labels = question(ids, 2, 99, 0, 1)
    assert torch.equal(labels, question(ids, 2, 99, 0, 1))
    assert not torch.equal(labels, question(ids, 2, 99, 0, 2))
    assert torch.equal(labels, question(ids.flip(1), 2, 99, 0, 1))  # of the words, in whatever order
    assert 10 < labels.sum() < 38


# -------------------------------------------------------------------------------------------------------- lessons


def test_simulated_fine_tunings_begin_anew_and_base_lessons_see_no_adapter(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []

    def watched(model: Any, cut: Any, ids: Tensor, labels: Tensor, trained: Sequence[Tensor] = ()) -> Any:
        if trained:
            begun.append(any(not parameter.any() for parameter in trained))  # B is 0 before the first step
        return observe(model, cut, ids, labels, trained)

    monkeypatch.setattr("fl_split.tools.fit.lessons.observe", watched)
    monkeypatch.setattr("fl_split.tools.fit.lessons._TUNING_STEPS", 2)
    teacher, folder = load_teacher(checkpoint("llama"), 1, 1, FIT), FitFolder(tmp_path / "x", {})
    record_lessons(teacher, text(), text()[:8], replace(FIT, lessons=20), folder)
    assert begun == 5 * [True, False]
    untouched = load_teacher(checkpoint("llama"), 1, 1, FIT)
    batch = Batches(untouched, FIT).draw(text(), 9, 0, random_tokens=True)
    expected, got = vars(observe(untouched, boundaries_of(untouched), *batch)), folder.load("lesson-18")
    assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert folder.load_one("lessons-done", "count") == 20


def test_a_lesson_holds_the_trunks_own_gradient(checkpoint: Callable[[str], Path]) -> None:
    teacher = load_teacher(checkpoint("llama"), 1, 1, FIT)
    lesson = observe(teacher, boundaries_of(teacher), *Batches(teacher, FIT).draw(text(), 0, 0))
    trunk = load_trunk(checkpoint("llama"), 1, 1)
    h1 = lesson.h1.clone().requires_grad_()
    h2 = trunk(inputs_embeds=h1)[0]
    torch.testing.assert_close(h2, lesson.h2)
    (g1,) = torch.autograd.grad(h2, h1, lesson.g2)
    torch.testing.assert_close(g1, lesson.g1, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------- forms and models


def test_first_layers_stay_whole_and_nodes_take_them_from_the_file(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = checkpoint("llama"), tmp_path / "surrogate.safetensors"
    card = fit(folder, 1, 1, text(), replace(FIT, layers=3, whole=2), out)
    assert card["whole"] == 2 and read_card(out) == card
    own = dict(load_trunk(folder, 1, 1).layers.named_parameters())
    tensors = load_file(out)
    for i in (1, 2):
        mine = {key.removeprefix(f"{i}."): value for key, value in tensors.items() if key.startswith(f"{i}.")}
        assert mine and all(torch.equal(value, own[f"{i}.{name}"]) for name, value in mine.items())
    assert not any(key.startswith(("3.", "4.")) and "proj.weight" in key for key in tensors)
    whole = sum(p.numel() for name, p in own.items() if name.startswith("1."))
    assert sum(value.numel() for value in tensors.values()) <= 3 * whole
    ends = load_ends(folder, 1, 1, LocalTrunk(load_trunk(folder, 1, 1)), surrogate="matched", matched=out)
    model = adapters.attach(ends, Lora(), train_bottom=True, seed=0)
    model(input_ids=text()[:2], labels=text()[:2]).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.bottom_parameters(model))


def test_an_encoder_is_fitted_as_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    out = tmp_path / "surrogate.safetensors"
    card = fit(tmp_path / "bert", 1, 1, text(), replace(FIT, task="sequence-classification", steps=40), out)
    assert card["gradient-cosine"] > card["gradient-cosine-before"]
    trunk = LocalTrunk(load_trunk(tmp_path / "bert", 1, 1))
    ends = load_ends(tmp_path / "bert", 1, 1, trunk, surrogate="matched", matched=out, labels=["a", "b"])
    model = adapters.attach(ends, Lora(), train_bottom=True, seed=0)
    model(input_ids=text()[:2], labels=torch.tensor([0, 1])).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in adapters.bottom_parameters(model))


def test_a_decoder_without_a_padding_token_is_fitted_as_a_classifier(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    setting = replace(FIT, task="sequence-classification")
    assert fit(checkpoint("llama"), 1, 1, text(), setting, tmp_path / "x")["task"] == "sequence-classification"


def test_a_teacher_in_bfloat16_gives_nearly_the_same_surrogate(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    half = load_teacher(checkpoint("llama"), 1, 1, replace(FIT, dtype="bfloat16"))
    folder = FitFolder(tmp_path / "y", {})
    record_lessons(half, text(), text()[:8], replace(FIT, dtype="bfloat16", lessons=2), folder)
    assert {tensor.dtype for tensor in folder.load("lesson-0").values()} == {torch.bfloat16}
    cards = [
        fit(checkpoint("llama"), 1, 1, text(), replace(FIT, dtype=dtype), tmp_path / dtype)
        for dtype in ("float32", "bfloat16")
    ]
    assert cards[1]["gradient-cosine"] == pytest.approx(cards[0]["gradient-cosine"], abs=0.02)


# ------------------------------------------------------------------------------------------------------ after a kill

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from fl_split.tools.fit import folder as kept
from fl_split.tools.fit.surrogate import fit
torch.set_num_threads(1)
folder, out, ids, at = sys.argv[1:]
save_file, count = kept.save_file, 0
def save(*args):
    global count
    count += 1
    save_file(*args)
    if count == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
kept.save_file, kept._SAVE_EVERY_S = save, -1
setting = kept.Fit(layers=2, steps=12, batch_size=4, length=16, lessons=12)
fit(Path(folder), 1, 1, load_file(ids)["ids"], setting, Path(out))
"""


def test_a_fit_that_was_killed_goes_on_and_comes_to_the_same_bit_for_bit(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    save_tensors(tmp_path / "ids.safetensors", {"ids": text()})
    out, left = tmp_path / "killed", []
    for at in (14, 16, 18, 0):
        command = [sys.executable, "-c", KILLED, checkpoint("llama"), out, tmp_path / "ids.safetensors", str(at)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == (-signal.SIGKILL if at else 0), done.stderr[-2000:]
        left.append({file.stem for file in Path(f"{out}.unfinished").glob("*.safetensors")})
    assert "cut-4" in left[0] and "cut-3" not in left[0]  # while layers were cut
    assert "tuning" in left[1] and "lessons-done" not in left[1]  # while lessons were recorded
    assert "fit" in left[2]  # in the fit
    assert not Path(f"{out}.unfinished").exists()
    fit(checkpoint("llama"), 1, 1, text(), FIT, tmp_path / "at-once")
    assert out.read_bytes() == (tmp_path / "at-once").read_bytes()


def test_an_unfinished_fit_of_another_setting_is_left_alone(
    checkpoint: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    FitFolder(tmp_path / "x", {"layers": 2}).save("a", {"a": torch.zeros(1)})
    with pytest.raises(ConfigError, match="unfinished fit of another model, text or setting"):
        fit(checkpoint("llama"), 1, 1, text(), FIT, tmp_path / "x")
    caplog.set_level("INFO")
    assert FitFolder(tmp_path / "x", {"layers": 2}).has("a")
    assert "going on with the unfinished fit in" in caplog.text


# ------------------------------------------------------------------------------------------------- said beforehand


def test_an_8b_model_needs_its_weights_in_bfloat16_and_little_more() -> None:
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    cut, setting = Boundaries("layers", 32, 2, 30), Fit(dtype="bfloat16", layers=4, whole=2, device="cuda")
    cost, budget = Cost.of(config, cut, setting)
    assert cost.teacher == pytest.approx(16.06e9, rel=0.01)
    assert 3.0e9 < cost.start < 8e9  # moments of one layer, not of 28
    assert cost.total < 35e9
    assert min(budget.shapes) == 4
    on_cpu, _ = Cost.of(config, cut, replace(setting, device="cpu"))  # C's heap holds more than is in use
    assert on_cpu.start == cost.start and 1.3 < on_cpu.total / cost.total < 1.7


def test_memory_and_time_are_said_before_and_the_time_left_on_the_way(
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("fl_split.tools.fit.folder._SAY_EVERY_S", 0.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 1e6}))
    fit(checkpoint("llama"), 1, 1, text(), FIT, tmp_path / "x")
    said = [record.message.split(" ")[0] for record in caplog.records if record.name.startswith("fl_split.tools")]
    stages = list(dict.fromkeys(said))
    assert stages == ["needs", "only", "takes", "inputs", "layers", "lessons:", "thin", "fit:"]
    assert "only 0.0 GB are free: use --dtype bfloat16" in caplog.text
    assert "fit: 12 of 12, gradient error" in caplog.text


def test_time_left_is_that_of_the_speed_so_far(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Stage("lessons", 110, done=10)
    for done in range(11, 111):
        now[0] += 60.0
        progress.step(done)
    assert "lessons: 11 of 110, 1:39:00 left" in caplog.text
    assert "lessons: 110 of 110, 0:00 left" in caplog.text


# ---------------------------------------------------------------------------------------------------- what goes wrong


def test_a_fit_that_diverges_writes_nothing_and_goes_on_at_a_lower_rate_with_what_was_recorded(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_split.tools.fit.folder._SAVE_EVERY_S", -1)
    out, short = tmp_path / "x", replace(FIT, lessons=4, steps=3)
    for steps in (1, 3):
        with pytest.raises(TrainingError, match=r"not finite at step \d+: lower --lr 1e\+30 and go on with the same"):
            fit(checkpoint("llama"), 1, 1, text(), replace(short, lr=1e30, steps=steps), out)
        assert not out.exists()
    recorded = {file: file.stat().st_mtime_ns for file in Path(f"{out}.unfinished").glob("[!f]*.safetensors")}
    assert len(recorded) > short.lessons
    with monkeypatch.context() as patch:
        patch.setattr("fl_split.tools.fit.folder.shutil.rmtree", lambda _: None)  # to look at it
        fit(checkpoint("llama"), 1, 1, text(), short, out)
    assert all(file.stat().st_mtime_ns == at for file, at in recorded.items())
    fit(checkpoint("llama"), 1, 1, text(), short, tmp_path / "at-once")
    assert out.read_bytes() == (tmp_path / "at-once").read_bytes()


def test_a_batch_larger_than_half_of_the_text_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="48 sequences of public text are too few for --batch-size 25: .* 24 at most"):
        fit(checkpoint("llama"), 1, 1, text(), replace(FIT, batch_size=25), tmp_path / "x")
    assert fit(checkpoint("llama"), 1, 1, text(), replace(FIT, batch_size=24, lessons=2, steps=1), tmp_path / "x")
