#!/usr/bin/env bash
# Trains on a Cloud TPU slice: all its workers run the same command and share one file system.
#
#   launch/tpu.sh COMMAND [settings] [-- training flags]
#
#   create    ask for the slice, and wait until it is there; after the summary of what is billed
#   install   copy the code to every worker, install it, mount the file system they share
#   start     spg_jax.train --distributed --workdir=DIR <training flags>, on every worker
#   logs      follow what one worker prints
#   status    the slice, and with --workdir the run
#   watch     all of the above as needed, and again after each preemption, until the run is finished
#   stop      let the run save and end; the slice stays, and is billed
#   delete    give the slice back
#
# Settings, as flags or as the variable named in brackets:
#   --project=ID             [PROJECT_ID] default: gcloud's own configuration
#   --zone=ZONE              [ZONE]
#   --name=NAME              [TPU_NAME]
#   --accelerator-type=TYPE  [ACCELERATOR_TYPE] such as v5litepod-16 or v6e-8
#   --runtime-version=NAME   [RUNTIME_VERSION] default: the one for JAX on that type
#   --spot                   cheaper, and may be taken away at any time
#   --create-flag=FLAG       a further flag for `queued-resources create`; may be repeated
#   --source=DIR             the git checkout to copy, with changes to tracked files; default: this one
#   --repo=URL, --ref=REF    have the workers clone this instead
#   --bucket=NAME            [BUCKET] Cloud Storage bucket to mount
#   --nfs=SERVER:/SHARE      [NFS] or NFS, such as Filestore
#   --mount=DIR              where, on every worker; default /mnt/shared
#   --workdir=DIR            [WORKDIR] where the run lives, in that file system
#   --worker=N               whose logs; default 0
#   --retries=N              watch: how often a run may fail within an hour of its start; default 3
#   --poll=SECONDS           watch, create: between two looks; default 60
#   --delete-after           watch: give the slice back when the run is finished
#   --yes                    do not ask
#   --dry-run                print each command instead of running it
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$here/common.sh"

parse() {
  project=${PROJECT_ID-} zone=${ZONE-} name=${TPU_NAME-} accelerator_type=${ACCELERATOR_TYPE-}
  runtime_version=${RUNTIME_VERSION-} bucket=${BUCKET-} nfs=${NFS-} workdir=${WORKDIR-}
  source=${here%/*} repo='' ref=HEAD mount=/mnt/shared worker=0 retries=3 poll=60
  spot='' delete_after='' yes='' create_flags=() training=()
  while (($#)); do
    case $1 in
      --project=* | --zone=* | --name=* | --accelerator-type=* | --runtime-version=* | --source=* | \
        --repo=* | --ref=* | --bucket=* | --nfs=* | --mount=* | --workdir=* | --worker=* | \
        --retries=* | --poll=*) assign "$1" ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --spot) spot=1 ;;
      --delete-after) delete_after=1 ;;
      --yes) yes=1 ;;
      --dry-run) dry_run=1 ;;
      --) training=("${@:2}") && break ;;
      *) fail "unknown setting '$1'; see launch/tpu.sh --help" ;;
    esac
    shift
  done
  [[ -z $dry_run ]] || exec 3>&1 # for commands whose output is read
  need zone name
  [[ $retries =~ ^[0-9]{1,5}$ && $retries != 0?* ]] ||
    fail "--retries is '$retries'; give an integer of at least 0"
  [[ $poll =~ ^[0-9]+(\.[0-9]+)?$ ]] || fail "--poll is '$poll'; give a number of seconds"
  location=("--zone=$zone" ${project:+"--project=$project"})
  [[ -z $bucket || -z $nfs ]] || fail "both --bucket=$bucket and --nfs=$nfs given; choose one"
  if [[ $bucket || $nfs ]]; then
    [[ -z $workdir || $workdir == "$mount"/* ]] ||
      fail "--workdir=$workdir is not under --mount=$mount, the file system all workers share"
  else
    mount=''
  fi
}

# --some-name=value into $some_name.
assign() {
  local setting=${1%%=*}
  setting=${setting#--}
  printf -v "${setting//-/_}" %s "${1#*=}"
}

# --- the slice -----------------------------------------------------------------------------------

# What gcloud answers; in a dry run nothing, as if there were no slice.
ask() {
  if [[ $dry_run ]]; then
    run "$@" >&3
  else
    "$@"
  fi
}

queue_state() {
  ask gcloud compute tpus queued-resources list "${location[@]}" \
    "--filter=name~/$name\$" '--format=value(state.state)'
}

# Prints absent, waiting, ready or lost. Fails as gcloud does.
slice_state() {
  local node queue
  node=$(ask gcloud compute tpus tpu-vm list "${location[@]}" \
    "--filter=name~/$name\$" '--format=value(state)') || return
  queue=$(queue_state) || return
  case $node/$queue in
    /) echo absent ;;
    */SUSPENDING | */DELETING | DELETING/*) echo waiting ;;
    PREEMPTED/* | TERMINATED/* | */SUSPENDED | */FAILED) echo lost ;;
    READY/*) echo ready ;;
    *) echo waiting ;; # in the queue, being made, being repaired, stopped
  esac
}

chips() {
  [[ $accelerator_type =~ ^(v2|v3|v4|v5p|v5litepod|v6e)-([1-9][0-9]{0,5})$ ]] ||
    fail "unknown --accelerator-type=$accelerator_type; expected such as v5litepod-16, v6e-8, v5p-8"
  case ${BASH_REMATCH[1]} in
    v5litepod | v6e) echo "${BASH_REMATCH[2]}" ;;
    *) echo $((BASH_REMATCH[2] / 2)) ;; # named by cores, two a chip
  esac
}

runtime() {
  case $accelerator_type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

# Says what will be billed, and asks.
agree_to_pay() {
  local count payer=$project tier='on demand'
  count=$(chips)
  [[ -z $spot ]] || tier=spot
  if [[ -z $payer ]]; then
    payer=$(ask gcloud config get-value project)
    [[ $payer || $dry_run ]] ||
      fail 'no project; add --project=ID or run: gcloud config set project ID'
  fi
  cat >&2 <<TEXT
billed: $name, $accelerator_type = $count chips, $tier, in $zone
to:     project ${payer:-as gcloud is configured}, from READY until launch/tpu.sh delete$1
cost:   $count chips x hours x the price of a chip-hour, see https://cloud.google.com/tpu/pricing
TEXT
  confirm 'ask for it?'
}

# Asks a question whose answer must be yes.
confirm() {
  local answer
  [[ -z $yes && -z $dry_run ]] || return 0
  [[ -t 0 ]] || fail "nobody here to answer '$1'; add --yes"
  read -r -p "$1 [y/N] " answer
  [[ $answer == [yY]* ]] || fail 'not confirmed, so nothing was done'
}

request_slice() {
  run gcloud compute tpus queued-resources create "$name" "${location[@]}" "--node-id=$name" \
    "--accelerator-type=$accelerator_type" "--runtime-version=${runtime_version:-$(runtime)}" \
    ${spot:+--spot} "${create_flags[@]}"
}

# With the request that made the slice, or without if it was made in another way.
discard_slice() {
  local queue
  queue=$(queue_state) || return
  if [[ $queue || $dry_run ]]; then
    run gcloud compute tpus queued-resources delete "$name" "${location[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${location[@]}" --quiet
  fi
}

wait_for_slice() {
  local state last=
  state=$(slice_state)
  until [[ $state == ready || $dry_run ]]; do
    [[ $state == waiting ]] || fail "$name is $state; see: $(quoted gcloud compute tpus \
      queued-resources describe "$name" "${location[@]}"), then launch/tpu.sh delete"
    [[ $state == "$last" ]] ||
      echo "$name: $state; Ctrl-C ends the waiting, not the request" >&2
    last=$state
    sleep "$poll"
    state=$(slice_state)
  done
}

# --- the run on it -------------------------------------------------------------------------------

# Runs a shell command in the home directory of all workers, or of those named.
on_workers() {
  "${2:-run}" gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" "--worker=${3:-all}" \
    "--command=$1"
}

# The same command of tpu_worker.sh, quoted for the remote shell.
at_work() {
  quoted spg-jax/launch/tpu_worker.sh "$@"
}

# Steps are chained by &&: `watch` asks whether it succeeded, and there errors do not stop a function.
install_everywhere() {
  local refuse='echo "a run is active; launch/tpu.sh stop first" >&2; exit 1'
  local fresh="if systemctl is-active --quiet spg-jax; then $refuse; fi; rm -rf spg-jax"
  local shared='' set_up
  set_up=$(at_work install)
  [[ -z $bucket ]] || shared=" && $(at_work mount gcsfuse "$bucket" "$mount")"
  [[ -z $nfs ]] || shared=" && $(at_work mount nfs "$nfs" "$mount")"
  set_up+="$shared && touch spg-jax/.installed"
  if [[ $repo ]]; then
    on_workers "$fresh && $(quoted git clone --quiet "$repo" spg-jax) && \
$(quoted git -C spg-jax checkout --quiet "$ref") && $set_up"
  else
    copy_source && on_workers "$fresh && mkdir spg-jax && \
tar -xzf spg-jax.tar.gz -C spg-jax && $set_up"
  fi
}

copy_source() {
  local folder archive tree status=0
  # A commit of the files as they are now, which no branch and no index knows; nothing if all is
  # committed.
  tree=$(git -C "$source" stash create) ||
    fail "--source=$source is not a git checkout; give one, or --repo=URL"
  # A folder of this user alone: others could put a file of theirs under a name that they can guess.
  folder=$(mktemp -d) || return
  archive=$folder/spg-jax.tar.gz
  run git -C "$source" archive --format=tar.gz "--output=$archive" "${tree:-HEAD}" &&
    run gcloud compute tpus tpu-vm scp "$archive" "$name:spg-jax.tar.gz" "${location[@]}" \
      --worker=all || status=$?
  rm -rf "$folder"
  return "$status"
}

start_everywhere() {
  on_workers "$(at_work start "$mount" "$workdir" "${training[@]}")"
}

# Prints finished, missing, failed, active or inactive: of the workers' answers the first of these.
run_state() {
  local answers state
  answers=$(on_workers "if [ -e spg-jax/.installed ]; then $(at_work state "$workdir"); \
else echo missing; fi" ask) || return
  for state in finished missing failed active activating deactivating; do
    if [[ $'\n'$answers$'\n' == *$'\n'$state$'\n'* ]]; then
      echo "${state/*activating/active}"
      return
    fi
  done
  echo inactive
}

# --- commands ------------------------------------------------------------------------------------

create() {
  local state
  need accelerator_type
  state=$(slice_state)
  case $state in
    absent)
      agree_to_pay ''
      request_slice
      ;;
    lost) fail "$name was preempted or failed; launch/tpu.sh delete, or watch, which does it all" ;;
    *) echo "$name exists, so it is used" >&2 ;;
  esac
  wait_for_slice
}

status() {
  local state
  state=$(slice_state)
  [[ $dry_run ]] || echo "slice $name: $state"
  if [[ $state == ready || $dry_run ]]; then
    state=$(run_state)
    [[ $dry_run ]] || echo "run: $state"
  fi
}

delete() {
  confirm "delete $name in $zone, and all that is only on its disks?"
  discard_slice
}

# One life of the slice, as a dry run shows it.
rehearse() {
  slice_state >/dev/null
  request_slice
  install_everywhere
  start_everywhere
  run_state >/dev/null
  [[ -z $delete_after ]] || discard_slice
}

watch() {
  need accelerator_type
  check_training "$workdir" "${training[@]}"
  agree_to_pay ', and again after each preemption'
  if [[ $dry_run ]]; then
    rehearse
    return
  fi
  local state last='' errors=0
  failures=0 requested='' started=$SECONDS
  while :; do
    if step; then
      errors=0
    else
      # A machine that is going away answers no ssh, and networks fail: wait and look again.
      ((++errors < 5)) || fail "the last 5 attempts failed; $name may still be billed"
    fi
    [[ $state == "$last" ]] || echo "$(date +%T) $name: $state" >&2
    last=$state
    [[ $state != finished ]] || break
    sleep "$poll"
  done
  if [[ $delete_after ]]; then
    discard_slice
  else
    echo "finished: $workdir; $name is billed until launch/tpu.sh delete" >&2
  fi
}

# One look at the slice and the run, and what follows from it.
step() {
  state=$(slice_state) || return
  case $state in
    absent) ask_again ;;
    lost)
      [[ -z $requested ]] || count_failure # it never got as far as ready
      discard_slice && ask_again
      ;;
    ready)
      requested=''
      state=$(run_state) || return
      case $state in
        missing) install_everywhere ;;
        inactive) begin ;;
        failed) count_failure && on_workers "$(at_work stop)" && begin ;;
      esac
      ;;
  esac
}

ask_again() {
  requested=1 started=$SECONDS
  request_slice
}

begin() {
  started=$SECONDS
  start_everywhere
}

count_failure() {
  ((SECONDS - started < 3600)) || failures=0
  ((++failures <= retries)) ||
    fail "the run or the request failed $failures times, each within an hour of its start; see \
launch/tpu.sh logs, or delete: $name may still be billed"
}

main() {
  local command=${1-}
  case $command in
    create | install | start | logs | status | watch | stop | delete) parse "${@:2}" ;;
    -h | --help) usage && exit ;;
    *) fail "'$command' is not a command; see launch/tpu.sh --help" ;;
  esac
  case $command in
    install) install_everywhere ;;
    start)
      check_training "$workdir" "${training[@]}"
      start_everywhere
      ;;
    logs) on_workers "$(at_work logs)" run "$worker" ;;
    stop) on_workers "$(at_work stop)" ;;
    *) "$command" ;;
  esac
}

main "$@"
