#!/usr/bin/env bash
# A ViTMAE that transformers builds fresh has position tables of zeros, and they are frozen.
#
# The guess: `ViTMAEForPreTraining(config)` starts with MAE's fixed sine-cosine positions, as the paper, the
# docstring of the class and the published weights have them.
# What happens: both tables, the encoder's and the decoder's, are zero and have requires_grad False. So a model that is
# trained from such a start never learns where a patch is, and a reader of its file who tells fixed
# positions from learned ones by comparing with the sine-cosine table takes them for learned.
# With transformers 4.57.6 the encoder's table is filled; the decoder's was zero then, too.
#
# Seen with transformers 5.24.0 and 4.57.6, torch 2.14.1, Python 3.11, Linux, on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.24.0
cat > "$folder/look.py" <<'P'
import subprocess
import sys

LOOK = """
import transformers
from transformers import ViTMAEConfig, ViTMAEForPreTraining
config = ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=64,
                      patch_size=8, decoder_hidden_size=16, decoder_num_hidden_layers=1,
                      decoder_num_attention_heads=2, decoder_intermediate_size=32)
model = ViTMAEForPreTraining(config)
for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
    print(transformers.__version__, tuple(table.shape), table.abs().max().item(), table.requires_grad)
"""


def look():
    """Each table's largest value and whether it trains."""
    done = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)
    rows = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    for what, largest, trains in rows:
        print(f"{what}: largest value {float(largest):.2f}, trains: {trains}")
    return [(float(largest), trains) for _, largest, trains in rows]


new = look()
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                "transformers==4.57.6"], check=True)
old = look()
sys.exit(new != [(0.0, "False")] * 2 or [largest > 0.5 for largest, _ in old] != [True, False])
P
cd "$folder"
"$folder/venv/bin/python" "$folder/look.py"
