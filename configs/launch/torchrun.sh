#!/bin/sh
# Train on several nodes with torchrun: run this on every node with the same arguments.
#   HEAD=node-0:29500 NODES=2 GPUS=8 sh configs/launch/torchrun.sh --config configs/llama2_70b_qlora_fsdp2.yaml
# Tokens are prepared before the processes meet, so that no collective waits for a tokenizer. Without a shared file system
# every node prepares its own cache; with one, the first node prepares it and the others find it.
set -eu
: "${HEAD:?address of the first node, host:port}" "${NODES:?number of nodes}" "${GPUS:?GPUs per node}"
PYTHON=${PYTHON:-python}

"$PYTHON" -m sft_lightning prepare "$@"
exec "$PYTHON" -m torch.distributed.run \
  --nnodes "$NODES" --nproc-per-node "$GPUS" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${JOB:-sft}" --max-restarts 0 \
  -m sft_lightning fit "$@" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" --ckpt_path last
