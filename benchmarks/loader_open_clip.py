"""open_clip's own training pipeline, as its trainer builds it; run by benchmarks/loader.py.

In the environment that loader.py makes: webdataset 0.2.86, for which open_clip_train was written.
Prints one line of JSON.
"""

import argparse
import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip_train.data import get_wds_dataset
from torch.utils.data import DataLoader

from benchmarks.steady import measure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--skip", type=int, required=True)
    parser.add_argument("--batches", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if version("webdataset") != "0.2.86":
        sys.exit(f"webdataset is {version('webdataset')}, not 0.2.86")
    found = measure(build(arguments), arguments.batch_size, arguments.skip, arguments.batches)
    sys.stdout.write(json.dumps(found) + "\n")


def build(arguments: argparse.Namespace) -> DataLoader:
    """One worker; all else as open_clip_train.params has it by default."""
    settings = SimpleNamespace(
        train_data=arguments.shards,
        train_num_samples=arguments.batch_size * (arguments.skip + arguments.batches + 8),
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=arguments.batch_size,
        workers=1,
        world_size=1,
        seed=0,
    )
    preprocess = image_transform_v2(PreprocessCfg(size=arguments.size), is_train=True)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    return get_wds_dataset(settings, preprocess, is_train=True, tokenizer=tokenizer).dataloader


if __name__ == "__main__":
    main()
