"""The ServerApp: read the configuration, start what is embedded, run the strategy, report. Wiring only."""

import logging
import platform
import sys
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.exception import PrivacyBudgetExhausted

from fl_split import __version__
from fl_split.config import RunConfig
from fl_split.model.checkpoint import resolve_model, trunk_needs
from fl_split.plan.plan import choose_split
from fl_split.plan.versions import check_versions
from fl_split.server.flower import flower_strategy, needs_start, restore_server_state
from fl_split.server.report import final_table, record_round
from fl_split.server.run_folder import RunFolder
from fl_split.server.start import starting_adapter
from fl_split.server.strategy import SplitStrategy
from fl_split.trunk import server as trunk_server
from fl_split.trunk.config import TrunkConfig
from fl_split.trunk.layers import hold_layers

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds that are left to run."""
    logger = _show_log()
    for check in check_versions():
        if check.status == "fail":
            logger.warning("%s: %s", check.name, check.text)
    config = choose_split(RunConfig.from_flat(context.run_config))
    packages = ("flwr", "torch", "transformers", "peft", "grpcio")
    versions = {"fl-split": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}
    run = RunFolder.open(config, versions)
    logger.info("run folder: %s", run.root)
    remaining = config.num_server_rounds - run.num_finished

    with ExitStack() as stack:
        address, shares = config.trunk.address, {}
        if config.surrogate.kind == "shares":
            shares = {"share-address": config.trunk.share_address}
        if address == "embedded" and remaining > 0:
            ends = (config.split.bottom_layers, config.split.top_layers)
            held = hold_layers(
                resolve_model(config.model.name, config.model.revision, trunk_needs(*ends)),
                *ends,
                config.model.torch_dtype,
            )
            trunk_config = _embedded_config(config)
            address = stack.enter_context(trunk_server.embedded(held, config=trunk_config))
            logger.info("embedded trunk: %s", address)
            if shares:
                shares = {"share-address": stack.enter_context(trunk_server.embedded(held, config=trunk_config))}
                logger.warning("both trunks of surrogate.kind='shares' run here: a trial, in which nothing is hidden")
        inner = flower_strategy(config.aggregation, config.dp)
        restore_server_state(inner, run.server_state())
        strategy = SplitStrategy(
            inner,
            lora=config.lora,
            min_nodes=config.aggregation.min_nodes,
            node_wait_s=config.run.node_wait_s,
            round_timeout=config.run.round_timeout,
            round_offset=run.num_finished,
            on_round=partial(record_round, run),
        )
        shared = run.shared()
        if run.num_finished == 0 and needs_start(config.aggregation, config.dp):
            shared = starting_adapter(config)
        if remaining > 0:
            try:
                strategy.start(
                    grid,
                    initial_arrays=ArrayRecord(shared),
                    num_rounds=remaining,
                    timeout=config.run.round_timeout,
                    train_config=ConfigRecord(
                        {"run-name": run.root.name, "run-id": run.run_id, "trunk-address": address, **shares}
                    ),
                )
            except PrivacyBudgetExhausted:
                logger.warning("dp.max-epsilon=%g would be exceeded: the run ends here", config.dp.max_epsilon)
    logger.info("%s", final_table(run))


def _embedded_config(config: RunConfig) -> TrunkConfig:
    """What of a run's configuration is its embedded trunk's."""
    return TrunkConfig.model_validate(
        {
            "model": {"surrogate": config.surrogate.file},
            "server": {
                "exact-gradient": config.trunk.exact_gradient,
                "gradient-shares": config.surrogate.kind == "shares",
            },
            "metrics": {"enabled": False},
        }
    )


def _show_log() -> logging.Logger:
    """Send fl-split's log to standard output, which ``flwr run --stream`` shows; Flower only shows its own."""
    logger = logging.getLogger("fl_split")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.addFilter(lambda record: not hasattr(record, "event"))  # a line per call is for a trunk of its own
        logger.addHandler(handler)
    return logger
