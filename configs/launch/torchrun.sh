#!/bin/sh
# Several nodes with torchrun: run this on every node, with the same arguments.
#   HEAD=node-0:29500 NODES=2 GPUS=8 sh configs/launch/torchrun.sh --config configs/llama2_70b_qlora_fsdp2.yaml
# Tokens are prepared before processes meet, so that nobody waits in a collective while one tokenizes. With a cache of
# its own (no shared file system) every node prepares; with a shared one the first does, and the others find it done.
set -eu
: "${HEAD:?the first node, as host:port}" "${NODES:?number of nodes}" "${GPUS:?GPUs of a node}"
PYTHON=${PYTHON:-python}

"$PYTHON" -m sft_lightning prepare "$@"
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-sft}" --max-restarts 0 \
  -m sft_lightning fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --ckpt_path last
