#!/usr/bin/env bash
# The whole job on a real model, by the commands a user would type. What a former call finished is not done again.
set -euo pipefail
run=runs/smollm2-lora
base=.cache/peftctl/smollm2-135m
held_out=.cache/peftctl/dialogues/heldout.jsonl

# echo a command as a user would type it, then run it
do_() {
  local word line=
  for word; do [[ $word == *[^[:alnum:]/._-]* ]] && word="\"$word\""; line+=" $word"; done
  printf '\n$%s\n' "$line"
  "$@"
}

do_ peftctl count-params recipes/smollm2-lora.yaml
do_ peftctl eval "$base" --data "$held_out"
if [ -d "$run" ]; then
  do_ peftctl train recipes/smollm2-lora.yaml --resume
else
  do_ peftctl train recipes/smollm2-lora.yaml
fi
do_ peftctl eval "$run" --data "$held_out"
[ -d "$run-merged" ] || do_ peftctl merge "$run/adapter" --output "$run-merged"

question=$(python -c 'import json, sys; print(json.loads(open(sys.argv[1]).readline())["messages"][0]["content"])' "$held_out")
do_ peftctl generate "$base" --prompt "$question" --max-new-tokens 60
do_ peftctl generate "$run" --prompt "$question" --max-new-tokens 60

python - "$run" <<'PYTHON'
import json, pathlib, sys
run = pathlib.Path(sys.argv[1])
result = json.loads((run / "run.json").read_text())["result"]
print(f"\n{run}: {result['steps']} steps, train loss {result['train_loss']:.4f}, "
      f"validation loss {result['validation_loss']:.4f}, {result['tokens_per_s']:.0f} tokens/s")
PYTHON
