"""The ServerApp: read the configuration, start what is embedded, run the strategy, report. Wiring only."""

import json
import logging
import platform
import time
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.exception import PrivacyBudgetExhausted
from transformers.utils import logging as transformers_logging

from fl_split import __version__
from fl_split.config import RunConfig, check_given
from fl_split.files import disk_in_words
from fl_split.log import show_log
from fl_split.model.checkpoint import resolve_model, trunk_needs
from fl_split.plan.plan import choose_split
from fl_split.plan.versions import check_versions
from fl_split.server.flower import flower_strategy, needs_start, restore_server_state
from fl_split.server.progress import Institutions
from fl_split.server.report import final_table, record_round
from fl_split.server.run_folder import RunFolder, claimed, named
from fl_split.server.start import starting_adapter
from fl_split.server.strategy import SplitStrategy
from fl_split.server.trackers import open_trackers
from fl_split.trunk import server as trunk_server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import HeldLayers, hold_layers

app = ServerApp()
logger = logging.getLogger("fl_split")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are left to run."""
    flower_log = show_log()
    transformers_logging.disable_progress_bar()
    config = named(RunConfig.from_flat(context.run_config))
    given = getattr(grid.run, "override_config", None)
    if given is not None and not config.run.resume:
        check_given(given)
    for check in check_versions():
        if check.status == "fail":
            logger.warning("%s: %s", check.name, check.text)
    packages = ("flwr", "torch", "transformers", "peft", "grpcio")
    versions = {"fl-split": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
    with ExitStack() as stack:
        stack.enter_context(disk_in_words(config.run.root))
        stack.enter_context(claimed(config))
        run = RunFolder.open(config, versions, given)
        flower_log.file = run.root / "errors.log"
        logger.info("run folder: %s", run.root)
        started = time.monotonic()
        if run.num_finished < run.config.num_server_rounds:
            _run_rounds(grid, run, stack)
    logger.info("%s", final_table(run, time.monotonic() - started))


def _run_rounds(grid: Grid, run: RunFolder, stack: ExitStack) -> None:
    config = choose_split(run.config).with_rates()
    if config.train.top_lr == "auto":
        logger.info("rates: train.top-lr='auto', so each node settles its own before its first round, and logs why")
    else:
        logger.info("rates: train.bottom-lr=%g, train.top-lr=%g", *config.train.rates)
    if config.aggregation.share != "none" and config.aggregation.personal == "auto":
        why = config.why_not_personal
        what = f"no adapter of their own ({why})" if why else "an adapter of their own, beside the one that is shared"
        logger.info("sharing: aggregation.personal='auto', so nodes train %s", what)
    address, shares = config.trunk.address, {}
    if config.has_shares:
        shares = {"share-address": config.trunk.share_address}
    if address == "embedded":
        held, trunk_config = _hold(config), _embedded_config(config)
        address = stack.enter_context(trunk_server.embedded(held, config=trunk_config))
        logger.info("embedded trunk: %s", address)
        if shares:
            shares = {"share-address": stack.enter_context(trunk_server.embedded(held, config=trunk_config))}
            logger.warning("both trunks of a gradient's shares run here: a trial, in which nothing is hidden")
    inner = flower_strategy(config.aggregation, config.dp)
    restore_server_state(inner, run.server_state())
    on_round = partial(record_round, run, open_trackers(run, stack))
    strategy = SplitStrategy(inner, config, run.num_finished, Institutions(run.numbers()), on_round)
    shared = run.shared()
    if run.num_finished == 0 and needs_start(config.aggregation, config.dp):
        shared = starting_adapter(config)
    about = {"run-name": run.root.name, "run-id": run.run_id, "trunk-address": address, **shares}
    try:
        strategy.start(
            strategy.watched(grid),
            initial_arrays=ArrayRecord(shared),
            num_rounds=config.num_server_rounds - run.num_finished,
            timeout=config.run.round_timeout,
            train_config=ConfigRecord({**about, "run-config": json.dumps(run.config.to_flat())}),
        )
    except PrivacyBudgetExhausted:
        logger.warning("dp.max-epsilon=%g would be exceeded: the run ends here", config.dp.max_epsilon)


def _hold(config: RunConfig) -> HeldLayers:
    """The trunk's layers of a run's model."""
    ends = (config.split.bottom_layers, config.split.top_layers)
    folder = resolve_model(config.model.name, config.model.revision, trunk_needs(*ends))
    return hold_layers(folder, *ends, config.model.torch_dtype)


def _embedded_config(config: RunConfig) -> TrunkConfig:
    """What of a run's configuration is its embedded trunk's."""
    return TrunkConfig.model_validate(
        {
            "model": {"surrogate": config.surrogate.file},
            "server": {
                "exact-gradient": config.trunk.exact_gradient,
                "gradient-shares": config.has_shares,
            },
            "metrics": {"enabled": False},
        }
    )
