"""`fastsae train --dry-run`: the plan's figures against sums by hand and against what a step really holds and computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from meter import Meter
from torch.utils.flop_counter import FlopCounterMode

from fastsae import cli
from fastsae.commands.plan import read_model
from fastsae.data.activations import ResidualStream
from fastsae.data.language_model import load_model
from fastsae.errors import UsageError
from fastsae.train import limits
from fastsae.train.config import TrainConfig
from fastsae.train.hardware import HARDWARE, Hardware
from fastsae.train.limits import needs
from fastsae.train.plan import Exchange, Model, Part, alternatives, check_processes, make_plan, step_traffic
from fastsae.train.trainer import Trainer, build_sae

MODEL = Model(d_in=64, n_before=10**6, n_weights=2 * 10**6, bytes_per_number=2)
SLOW = Hardware(flops_16=100.0, flops_32=10.0, memory_bandwidth=1.0, link=4.0, network=1.0, per_machine=4)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"batch_size": 16, "buffer_tokens": 64, "tokens": 160, "d_sae": 100, **options})


def train_on(trainer: Trainer, x: torch.Tensor) -> None:
    """A step on activations as they are."""
    with torch.autocast("cpu", torch.bfloat16, enabled=trainer.config.dtype == "bfloat16"):
        loss = trainer.sae.training_forward(x, **trainer.loss_options()).loss
    trainer.optimizer.backward(loss)
    trainer.optimizer.step()


@pytest.mark.parametrize(
    ("n", "d_in", "d_sae", "averaged", "sharded"),
    # MB that 8 processes send: gradients in fp32, or activations in 16 bits and reconstructions in fp32
    [(8192, 2304, 65_536, 2115, 165.2), (4096, 768, 16_384, 176.5, 27.5), (8192, 3584, 2**20, 52_640, 256.9)],
)
def test_sharding_moves_fewer_bytes_than_averaging(
    n: int, d_in: int, d_sae: int, averaged: float, sharded: float
) -> None:
    run = TrainConfig(batch_size=n, d_sae=d_sae)
    gradients = step_traffic(run, d_in, d_sae, 8, 2)
    assert list(gradients) == ["gradients"]
    assert gradients["gradients"] / 1e6 == pytest.approx(averaged, rel=2e-3)
    parts = step_traffic(replace(run, shard_features=8), d_in, d_sae, 8, 2)
    assert set(parts) == {"rows", "reconstruction", "penalty", "norm"}
    assert (parts["rows"] + parts["reconstruction"]) / 1e6 == pytest.approx(sharded, rel=2e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # 18 rows over 6 processes, of which 3 share the features: 9 rows of a group, 4 / 3 times in a sum of 3
        ({}, {"rows": 2 * 3 * 64 * 2, "reconstruction": 9 * 64 * 4 * 4 / 3, "penalty": 9 * 4 * 4 / 3, "norm": 8 * 4 / 3}),
        ({"reduce_dtype": "bfloat16"}, {"reconstruction": 9 * 64 * 2 * 4 / 3}),
        # 11 rows in parts of 3, 3, 3 and 2: in 16 bits as if of 3, 3, 3 and 3, as 3 processes sum equal shares of each
        ({"overlap_chunks": 4, "batch_size": 20}, {"reconstruction": 11 * 64 * 4 * 4 / 3}),
        ({"overlap_chunks": 4, "batch_size": 20, "reduce_dtype": "bfloat16"}, {"reconstruction": 12 * 64 * 2 * 4 / 3}),
        ({"clip_norm": 0}, {"norm": None}),
        ({"sparsity": "tanh"}, {"penalty": 9 * 2 * 4 * 4 / 3}),
        ({"sparsity": "quadratic"}, {"penalty": 9 * 4 * 4 / 3}),
        ({"architecture": "relu"}, {"penalty": 9 * 2 * 4 * 4 / 3, "candidates": None, "b_dec": None}),
        ({"apply_b_dec_to_input": True}, {"b_dec": 64 * 4 * 4 / 3}),
        # twice the fair share of 30 is 20, more than a process holds by chance: of 3 in 10,000 tokens the other 10 are sent; of 8
        # it is 6, and 5 % of the tokens are looked at twice; of 2 it is 2
        ({"architecture": "topk", "k": 30}, {"candidates": 2 * 9 * (20 + 3.5e-4 * 10) * 4}),
        ({"architecture": "topk", "k": 8}, {"candidates": 2 * 9 * (6 + 0.0504 * 2) * 4, "penalty": 9 * 4 * 4 / 3}),
        ({"architecture": "topk", "k": 8}, {"b_dec": 64 * 4 * 4 / 3}),
        ({"architecture": "topk", "k": 2}, {"candidates": 2 * 9 * 2 * 4}),
        # two histograms of 2^16 counts over all 6 processes
        ({"architecture": "batchtopk", "k": 8}, {"histogram": 2 * 2**16 * 4 * 2 * 5 / 6, "candidates": None}),
        # W_enc, W_dec, b_enc and the threshold of 34 features, and b_dec, over the 2 groups
        ({}, {"gradients": (34 * (2 * 64 + 2) + 64) * 4, "histogram": None}),
        ({"architecture": "relu"}, {"gradients": (34 * (2 * 64 + 1) + 64) * 4}),
        ({"frozen": "decoder"}, {"gradients": (34 * (64 + 2) + 64) * 4}),
        # 20 rows: the first 2 of 6 processes have 4, so that all of the first group send as if they had 4
        ({"batch_size": 20}, {"rows": 2 * 4 * 64 * 2, "reconstruction": 11 * 64 * 4 * 4 / 3}),
    ],
)  # fmt: skip
def test_bytes_by_name(options: dict[str, Any], expected: dict[str, float | None]) -> None:
    run = config(**{"batch_size": 18, "shard_features": 3, **options})
    found = step_traffic(run, 64, 100, 6, 2)
    assert {name: found.get(name) for name in expected} == {
        name: None if n is None else pytest.approx(n, rel=1e-4) for name, n in expected.items()
    }


def test_dead_features_send_a_second_reconstruction() -> None:
    run = config(architecture="topk", k=8, shard_features=2)
    usual, more = (step_traffic(run, 64, 100, 2, 4, with_dead=dead) for dead in (False, True))
    assert more.pop("reconstruction") == 2 * usual.pop("reconstruction")
    assert more.pop("candidates") - usual.pop("candidates") == 16 * 32 * 4  # d_in // 2 of each token
    assert more.pop("penalty") == 2 * usual.pop("penalty")
    assert more.pop("b_dec") == 2 * usual.pop("b_dec")
    assert more == usual
    assert step_traffic(replace(run, shard_features=1), 64, 100, 1, 4, with_dead=True) == {}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0},
        {"dtype": "bfloat16"},
        {"architecture": "relu", "normalize_decoder": False},
        {"architecture": "topk", "k": 4},
        {"architecture": "topk", "k": 4, "clip_norm": 0, "normalize_decoder": False},
        {"architecture": "batchtopk", "k": 4},
        {"frozen": "decoder"},
        {"log_threshold": True},
    ],
    ids=str,
)
def test_a_step_holds_what_the_plan_says(options: dict[str, Any]) -> None:
    run = config(d_sae=4096, init_l0=20.0, **options)  # sparse from the first step
    trainer = Trainer(build_sae(run, 64, torch.device("cpu")), iter(()), run)
    acts = torch.randn(2048, 64)
    trainer.initialize(acts)
    optimizer, grads = trainer.optimizer, dict[str, int]()
    step = optimizer.step

    def watched() -> None:
        step()
        for name, p in trainer.sae.named_parameters():  # of the matrices, those that are no mark of the optimiser's
            is_tensor = p.grad is not None and type(p.grad) is torch.Tensor
            grads[name] = p.nbytes if is_tensor or p in optimizer._kept else 0

    optimizer.step = watched  # type: ignore[method-assign]
    train_on(trainer, acts[:16])
    found = {need.what: need.n_bytes for need in needs([run], 64, 4, "cpu")}
    assert sum(p.nbytes for p in trainer.sae.parameters()) == found["weights of the SAE"]
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert sum(tensor.nbytes for tensor in states) == found["Adam's two means"]
    of_weights = grads["W_enc"] + grads["W_dec"]
    assert found.get("gradients of the weights", 0) == pytest.approx(of_weights, rel=0.05)
    copies = 0 if optimizer._copies is None else sum(copy.nbytes for copy in optimizer._copies._copies.values())
    assert found.get("copies of the weights in bfloat16", 0) == copies


def test_a_first_step_holds_no_more_than_the_plan_says() -> None:
    run = config(d_sae=40_000, init_l0=20.0)
    trainer = Trainer(build_sae(run, 64, torch.device("cpu")), iter(()), run)
    acts = torch.randn(2048, 64)
    trainer.initialize(acts)
    with Meter() as meter:
        train_on(trainer, acts[:16])
    new = sum(need.n_bytes for need in needs([run], 64, 4, "cpu") if need.what != "weights of the SAE")
    assert 0.9 * new < meter.peak < 1.1 * new


def test_each_process_holds_its_share() -> None:
    whole, own = (
        {need.what: need.n_bytes for need in needs([config(shard_features=n, d_sae=4000)], 64, 2, "cpu", n)}
        for n in (1, 4)
    )
    bias = 64 * 4  # b_dec, which every process holds
    assert own["weights of the SAE"] == (whole["weights of the SAE"] - bias) / 4 + bias
    assert own["Adam's two means"] == 2 * own["weights of the SAE"]
    assert own["mixing buffer"] == whole["mixing buffer"] / 4
    assert own["batch as the SAE takes it"] == whole["batch as the SAE takes it"]  # a group sees the same tokens
    assert own["active features of the batch"] == whole["active features of the batch"] / 4
    averaged = {need.what: need.n_bytes for need in needs([config(d_sae=4000)], 64, 2, "cuda", 4)}
    assert averaged["gradients of the weights"] == whole["weights of the SAE"]
    assert averaged["batch as the SAE takes it"] == whole["batch as the SAE takes it"] / 4


def test_a_run_of_several_processes_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "free_memory", lambda device: 8_000_000_000)
    cpu, run = torch.device("cpu"), TrainConfig(d_sae=10_000_000, shard_features=4)
    limits.check_memory([run], 64, 4, cpu, 4)  # a quarter of 20.8 GB
    with pytest.raises(UsageError, match=r"^d_sae: .* got 10,000,000, which alone takes 20\.8 GB"):
        limits.check_memory([run], 64, 4, cpu, 4, n_sharing=4)


def test_a_part_takes_the_longer_of_computing_and_reading() -> None:
    assert Part("", flops=50.0, n_bytes=3.0).seconds(SLOW) == 5.0
    assert Part("", flops=50.0, n_bytes=3.0, is_narrow=True).seconds(SLOW) == 3.0


@pytest.mark.parametrize(
    ("size", "stride", "inside", "outside"),
    [
        (4, 1, 80, 0),  # all on a machine of 4
        (2, 2, 80, 0),
        (8, 1, 80, 20),  # two machines, whose 4 cards share what leaves them
        (4, 2, 80, 40),  # 2 of 4 on each machine
        (2, 4, 0, 80),  # each on another machine
        (16, 8, 0, 80),
    ],
)
def test_a_ring_leaves_a_machine_by_the_cards_of_its_members(
    size: int, stride: int, inside: float, outside: float
) -> None:
    exchange = Exchange("gradients", 80.0, size, stride)
    assert exchange.by_link(SLOW) == (inside, outside)
    assert exchange.seconds(SLOW) == max(inside / 4, outside)


def test_the_sum_of_a_chunk_hides_behind_the_next_one() -> None:
    run = config(shard_features=4)
    whole = make_plan([run], MODEL, 4)
    chunked = make_plan([replace(run, overlap_chunks=4)], MODEL, 4)
    assert whole.hidden(SLOW) == 0
    travels = next(e.seconds(SLOW) for e in whole.exchanges if e.name == "reconstruction")
    encoded = next(p.seconds(SLOW) for p in whole.parts if p.name == "encode")
    assert chunked.hidden(SLOW) == min(travels, encoded) * 3 / 4
    assert whole.seconds(SLOW) - chunked.seconds(SLOW) == pytest.approx(chunked.hidden(SLOW))
    of_batch = replace(run, overlap_chunks=4, architecture="batchtopk", k=8)
    assert make_plan([of_batch], MODEL, 4).hidden(SLOW) == 0  # it chooses from the whole batch


def test_the_work_of_a_process_is_its_share() -> None:
    one, many = (make_plan([config(shard_features=n)], MODEL, 2 * n) for n in (1, 4))
    for part, other in zip(one.parts, many.parts, strict=True):
        assert part.flops / other.flops == pytest.approx(4, rel=0.02)  # b_dec is whole on each
    cached = make_plan([config(activations="folder")], MODEL)
    assert cached.parts[0].flops == 0
    two = make_plan([config(), config(architecture="relu")], MODEL)
    assert [part.name for part in two.parts[1:4]] == [part.name for part in two.parts[4:]]


def test_each_group_trains_saes_of_its_own_where_there_are_enough() -> None:
    saes = [config(d_sae=100, layer=1), config(d_sae=300, layer=2), config(d_sae=250, layer=1)]
    plan = make_plan(saes, MODEL, 2)  # 300 in one process, 250 and 100 in the other
    assert plan.is_placed
    weights = sum(2 * 64 * n + 2 * n + 64 for n in (250, 100))
    found = {need.what: need.n_bytes for need in plan.memory}
    assert found["weights of the SAE"] == 4 * weights
    assert found["batches as they come"] == 2 * 16 * 64 * 2  # of both layers, the rows of both processes
    assert [part.flops for part in plan.parts if part.name == "encode"] == [2 * 16 * 64 * n for n in (100, 250)]
    assert [(e.name, e.n_bytes, e.size) for e in plan.exchanges] == [("rows", 2 * 8 * 64 * 2, 2)]
    shared = make_plan([replace(sae, shard_features=2) for sae in saes], MODEL, 4)
    assert [(e.name, e.n_bytes) for e in shared.exchanges if e.name == "rows"] == [("rows", 2 * 3 * 4 * 64 * 2)]
    parts = [e.n_bytes for e in shared.exchanges if e.name == "reconstruction"]
    assert parts == [16 * 64 * 4] * 2  # the two SAEs of a group, on the whole batch
    assert "gradients" not in {e.name for e in shared.exchanges}


def test_every_group_trains_all_saes_where_there_are_too_few() -> None:
    saes = [config(d_sae=100, layer=1), config(d_sae=300, layer=2)]
    plan = make_plan(saes, MODEL, 4)
    assert not plan.is_placed
    assert [e.n_bytes for e in plan.exchanges] == [2 * 3 / 4 * 4 * (130 * n + 64) for n in (100, 300)]
    chunked = [replace(sae, shard_features=4, overlap_chunks=n) for sae, n in zip(saes, (1, 4), strict=True)]
    last = make_plan(chunked, MODEL, 4)
    alone = make_plan(chunked[1:], MODEL, 4)
    assert last.hidden(SLOW) == alone.hidden(SLOW) > 0
    assert [e.name for e in last.exchanges].count("rows") == 1


def test_operations_are_those_that_torch_counts(tiny_model: Path) -> None:
    found, sizes = read_model([TrainConfig(model=str(tiny_model), model_dtype="float32", layer=1)], "cpu")
    model, _ = load_model(str(tiny_model), "float32")
    assert sizes.n_weights == sum(p.numel() for p in model.parameters())
    assert (sizes.d_in, sizes.bytes_per_number, found[0].layer) == (16, 4, 1)
    ids = torch.zeros(4, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        ResidualStream(model, 1)(ids, torch.ones_like(ids))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for name, n in counts.items() if str(name) in ("aten.mm", "aten.addmm"))
    plan = make_plan([config(batch_size=32)], sizes)
    assert plan.parts[0].flops == pytest.approx(products, rel=0.05)  # biases and norms are counted as weights
    _, before = read_model([TrainConfig(model=str(tiny_model), layer=1, hook="resid_pre")], "cpu")
    assert before.n_before == sizes.n_before / 2


@pytest.mark.parametrize(
    ("options", "n", "message"),
    [
        ({"shard_features": 4}, 6, r"^shard_features: expected a divisor of the 6 processes, got 4"),
        ({"shard_features": 4}, 1, r"^shard_features: expected a divisor of the 1 processes, got 4"),
        (
            {"shard_features": 2, "k": 8},
            2,
            r"^k: expected none where processes share the features of a jumprelu SAE, got 8",
        ),
        ({}, 17, r"^batch_size: expected at least one token for each of 17 processes, got 16"),
        ({}, 0, r"^processes: expected a whole number from 1 to 1,000,000, got 0"),
        ({}, 10**30, r"^processes: expected .*, got a number of about 31 digits"),
    ],
)
def test_processes_that_do_not_fit(options: dict[str, Any], n: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_processes(config(**options), n)
    with pytest.raises(UsageError, match=message):
        make_plan([config(**options)], MODEL, n)


def test_every_division_of_the_features_is_compared() -> None:
    plan = make_plan([config(shard_features=3)], MODEL, 12)
    found = alternatives(plan, "cuda")
    assert list(found) == [1, 2, 3, 4, 6, 12]
    assert found[3].sent == plan.sent > 0
    assert list(alternatives(make_plan([config(k=8)], MODEL, 12), "cuda")) == [1]  # a choice beside a threshold


def test_the_command_plans_and_writes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train",
        "--dry-run",
        "--model",
        str(tiny_model),
        "--model-dtype",
        "float32",
        "--output",
        "out",
        "--device",
        "cpu",
    ]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "weights of the SAE" in out
    assert "GFLOP" in out
    assert "--shard-features" not in out  # one process sends nothing
    assert " ms" not in out
    assert "give --hardware" in out
    assert cli.main([*arguments, "--processes", "8", "--shard-features", "4", "--hardware", "h100"]) == 0
    out = capsys.readouterr().out
    for text in (
        "on 8 processes: 2 groups of 4",
        "reconstruction",
        "gradients",
        "fewest bytes",
        "as given",
        "a step of 1,024 tokens",
    ):
        assert text in out
    assert not list(tmp_path.iterdir())
    assert cli.main([*arguments, "--processes", "2", "--target-l0", "4,8"]) == 0
    assert "each group trains other SAEs" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(arguments) == 0
    assert "on 4 processes" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "4"], "--processes: expected --dry-run beside it"),
        (["--hardware", "h100"], "--hardware: expected --dry-run beside it"),
        (["--dry-run", "--flops", "1"], "--flops: expected --hardware, or all of"),
        (["--dry-run", "--processes", "3", "--shard-features", "2"], "--shard-features: expected a divisor of the 3"),
        (["--dry-run", "--processes", "0"], "processes: expected a whole number from 1"),
        (["--dry-run", "--layer", "99"], "--layer: expected 0 to 1"),
        (["--dry-run", "--k", "1000000"], "--k: expected at most the"),
        (["--dry-run", "--model", "/no/such/folder"], "no folder"),
    ],
)  # fmt: skip
def test_wrong_flags_are_named(
    flags: list[str], message: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = flags if "--model" in flags else ["--model", str(tiny_model), *flags]
    assert cli.main(["train", "--model-dtype", "float32", "--device", "cpu", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e300", "x", ""])
def test_rates_are_positive_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--dry-run", "--flops", text])
    assert "expected a number above 0" in capsys.readouterr().err


def test_given_rates_replace_those_of_the_data_sheet(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["train", "--dry-run", "--model", str(tiny_model), "--model-dtype", "float32", "--processes", "16"]
    rates = ["--flops", "1", "--memory-bandwidth", "1", "--link-bandwidth", "0.001"]
    assert cli.main([*common, *rates, "--hardware", "a100"]) == 0
    named = capsys.readouterr().out
    assert cli.main([*common, *rates]) == 0
    assert HARDWARE["a100"].network > 0.001 * 1e9
    times = [
        [line for line in text.splitlines() if line.startswith("a step of 1,024")]
        for text in (named, capsys.readouterr().out)
    ]
    assert times[0]
    if not torch.cuda.is_available():  # a CPU holds the gradients as tensors, as an average over processes does
        assert times[0] == times[1]


def test_the_table_of_the_documentation_is_what_the_plan_says() -> None:
    pytest.importorskip("transformers")
    from benchmarks.plans import table

    page = Path(__file__).parents[2] / "docs" / "distributed.md"
    assert f"\n{table()}\n" in page.read_text(encoding="utf-8")
