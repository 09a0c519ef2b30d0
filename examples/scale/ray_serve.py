"""Ray Serve: serve run ray_serve:app, with POOLHOUSE_MODEL in the environment; all routes, in two replicas."""

from ray import serve

import poolhouse


# Of the requests that a replica has at a time it makes packs: few would be small ones.
@serve.deployment(num_replicas=2, max_ongoing_requests=100, ray_actor_options={"num_gpus": 0})
@serve.ingress(poolhouse.asgi())
class Poolhouse:
    """A replica; it loads the model for itself when it starts."""


app = Poolhouse.bind()
