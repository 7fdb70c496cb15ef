"""Stage 1: run the network once, write activations and gradients to a cache.

reads    image lists and images (or a packaged set), the network's weights
writes   cache/BENCHMARK-MODEL.zarr: per layer each neuron's activation and gradient, logits, features, labels
never    tunes parameters, reads a score, or changes a block that is marked as written
resumes  at the first unmarked block of the first unsealed split; the finished cache equals an uninterrupted one

    python stages/extract.py digits
    python stages/extract.py cifar10 --model resnet20 --checkpoint resnet20.th --data-root data
"""

import sys

from nacpipe.cli import main

main(["extract", *sys.argv[1:]])
