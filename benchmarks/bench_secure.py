"""What do the masks of `aggregation.secure` cost a round, and how exact is the sum?

    python benchmarks/bench_secure.py [--nodes 4 8] [--millions 1] [--quick] [--json FILE]

Each node states a key, checks the others', and masks an array of a million weights; the server sums. Seconds are of one
node's masks alone, and of the server's sum, in this process, on one thread; messages are not in them: in Flower's
deployment engine a round has one more message to each node, which starts a process (`bench_rounds.py`), or asks
`fl-split executor`. The error is the largest difference to the weighted mean in float64, in the ring's steps of 2^-32.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from about import about, write

from fl_split.config import NodeConfig
from fl_split.node import masks
from fl_split.ring import STEP, add, from_ring
from fl_split.server.secure import mean

ABOUT = b"benchmark 1\n"


def measure(num_nodes: int, num_weights: int, folder: Path) -> dict[str, float]:
    """One round of masks."""
    generator = torch.Generator().manual_seed(0)
    shared = [{"weights": 0.05 * torch.randn(num_weights, generator=generator)} for _ in range(num_nodes)]
    weights = [100 + 7 * i for i in range(num_nodes)]
    nodes = [NodeConfig(partition_id=i, num_partitions=num_nodes) for i in range(num_nodes)]
    who = [masks.Identity.of(node) for node in nodes]
    seconds = [0.0] * num_nodes
    signed_keys, parts = [], []
    for i in range(num_nodes):
        started = time.perf_counter()
        signed_keys.append(masks.sign_key(who[i], folder / str(i), ABOUT))
        seconds[i] += time.perf_counter() - started
    for i in range(num_nodes):
        started = time.perf_counter()
        told = masks.digest(shared[0])  # as large as what the server sends
        secrets = masks.agree(who[i], folder / str(i), ABOUT, signed_keys, told)
        parts.append(masks.mask(shared[i], weights[i], secrets))
        seconds[i] += time.perf_counter() - started
    started = time.perf_counter()
    mean(parts)
    server_s = time.perf_counter() - started
    got = from_ring(add([part["weights"] for part in parts])) / sum(weights)
    exact = sum(w * s["weights"].double().numpy() for w, s in zip(weights, shared, strict=True)) / sum(weights)
    return {
        f"secure-overhead-s/{num_nodes}-nodes": statistics.median(seconds),
        f"secure-server-s/{num_nodes}-nodes": server_s,
        f"secure-sum-error/{num_nodes}-nodes": float(np.abs(got - exact).max() / STEP),
        f"secure-bytes-over-clear/{num_nodes}-nodes": sum(p.nbytes for p in parts[0].values()) / (4 * num_weights),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--millions", type=float, default=1.0, help="of shared weights")
    parser.add_argument("--quick", action="store_true", help="a tenth of the weights, the fewest nodes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.nodes, options.millions = options.nodes[:1], options.millions / 10
    block = about(0, "cryptography")
    figures: dict[str, float] = {"millions-of-weights": options.millions}
    for num_nodes in options.nodes:
        with tempfile.TemporaryDirectory() as folder:
            figures |= measure(num_nodes, int(options.millions * 1e6), Path(folder))
    for name, value in figures.items():
        print(f"{name:36}{value:.4g}")
    print(block)
    write(options.json, figures | block)


if __name__ == "__main__":
    main()
