"""Ray Serve: serve run ray_serve:app, with POOLHOUSE_MODEL in the environment; all routes, in two replicas."""

from ray import serve

import poolhouse


@serve.deployment(num_replicas=2, ray_actor_options={"num_gpus": 0})
@serve.ingress(poolhouse.asgi())
class Poolhouse:
    """A replica; it loads the model for itself when it starts."""


app = Poolhouse.bind()
