#!/usr/bin/env bash
# What tpu.sh has every worker of a slice do, in the copy of the code that it put there.
#
#   tpu_worker.sh install                          Python and this project, in a virtual environment
#   tpu_worker.sh mount gcsfuse|nfs SOURCE DIR     a bucket, or SERVER:/SHARE
#   tpu_worker.sh start MOUNT WORKDIR [flags]      spg_jax.train as a systemd service; MOUNT may be ''
#   tpu_worker.sh state WORKDIR                    finished, active, failed, inactive; WORKDIR may be ''
#   tpu_worker.sh logs                             follow what it prints
#   tpu_worker.sh stop                             SIGTERM, then wait until it has saved
set -euo pipefail

tree=$(cd "$(dirname "$0")/.." && pwd)
environment=$HOME/.spg-jax-venv
unit=spg-jax

# The images come with Python 3.10, too old for JAX; uv brings its own.
install() {
  python3 -m pip install --quiet --user --upgrade uv
  [[ -x $environment/bin/python ]] || python3 -m uv venv --quiet --python 3.12 "$environment"
  cd "$tree"
  python3 -m uv pip install --quiet --python "$environment/bin/python" --editable '.[tpu,hf]'
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent --show-error https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update --quiet --quiet
  sudo apt-get install --quiet --quiet --yes gcsfuse
}

# Several workers write: each must see at once what another wrote, so nothing is cached about files.
mount_gcsfuse() {
  command -v gcsfuse >/dev/null || install_gcsfuse
  mount_for_good "$1" "$2" gcsfuse "rw,_netdev,allow_other,implicit_dirs,uid=$(id -u),gid=$(id -g),\
metadata_cache_ttl_secs=0,metadata_cache_negative_ttl_secs=0"
}

mount_nfs() {
  sudo apt-get update --quiet --quiet
  sudo apt-get install --quiet --quiet --yes nfs-common
  mount_for_good "$1" "$2" nfs rw,_netdev,hard
  [[ -w $2 ]] || sudo chown "$(id -u):$(id -g)" "$2"
}

# By fstab, so that a restarted machine has it again, and as a unit of systemd, so that at shutdown it
# outlives the training that saves into it.
mount_for_good() {
  sudo mkdir -p "$2"
  if grep " $2 " /etc/fstab | grep -vq "^$1 "; then
    echo "$(hostname): $2 is where $(grep " $2 " /etc/fstab | cut -d' ' -f1) is mounted, not $1;" \
      "use another mount point, or a new slice" >&2
    exit 1
  fi
  grep -q "^$1 $2 " /etc/fstab || echo "$1 $2 $3 $4 0 0" | sudo tee --append /etc/fstab >/dev/null
  sudo systemctl daemon-reload
  sudo systemctl start "$2"
  mountpoint --quiet "$2"
}

# A service gets SIGTERM at shutdown, before the network and the mount go away, and time to save.
start() {
  local mount=$1 workdir=$2
  shift 2
  if [[ $mount ]] && ! mountpoint --quiet "$mount"; then
    echo "$(hostname): nothing is mounted at $mount; run tpu.sh install with --bucket or --nfs" >&2
    exit 1
  fi
  local command=("$environment/bin/python" -m spg_jax.train --distributed "--workdir=$workdir" "$@")
  sudo systemctl reset-failed "$unit" 2>/dev/null || true # there is nothing to forget at first
  # The chips need locked memory. systemd would expand $NAME in the command, and reads $$ as $.
  sudo systemd-run --quiet --unit="$unit" --uid="$(id -un)" --working-directory="$tree" \
    --setenv=PYTHONUNBUFFERED=1 --property=LimitMEMLOCK=infinity --property=TimeoutStopSec=600 \
    --property=After=network-online.target ${mount:+"--property=RequiresMountsFor=$mount"} \
    "${command[@]//\$/\$\$}"
}

state() {
  if [[ $1 && -f $1/result.json ]]; then
    echo finished
  else
    systemctl is-active "$unit" || true # says inactive or failed by its exit status, too
  fi
}

logs() {
  sudo journalctl --unit="$unit" --output=cat --lines=100 --follow
}

stop() {
  if systemctl is-active --quiet "$unit"; then
    sudo systemctl stop "$unit"
  fi
}

case ${1-} in
  install | start | state | logs | stop) "$@" ;;
  mount) "mount_$2" "${@:3}" ;;
  *)
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
