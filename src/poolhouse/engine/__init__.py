"""The engine: requests in, futures out; worker threads run packed batches."""

from poolhouse.engine.process import let_threads_wait_shortly

# Whatever of this room is imported first, it is before torch.
let_threads_wait_shortly()
