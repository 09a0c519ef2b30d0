"""Ray Data: python ray_data.py IN OUT MODEL [GPUS]. Called again after a crash, it goes on with what is not written."""

import sys

import ray
from ray.data.checkpoint import CheckpointConfig

from poolhouse.batch import Embedder

source, out, model, gpus = (*sys.argv[1:], "0")[:4]
ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
    "id", f"{out}.done", delete_checkpoint_on_success=False
)
(
    ray.data.read_parquet(source)
    .map_batches(
        Embedder,
        fn_constructor_args=(model,),
        fn_constructor_kwargs={"overflow": "truncate", "output": {"truncated": "cut"}},
        batch_format="pyarrow",
        batch_size=1024,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=max(1, int(gpus))),
        num_gpus=min(1, int(gpus)),
    )
    .write_parquet(out)
)
