# shellcheck shell=bash
# What tpu.sh and slurm.sh share; sourced, not run.

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "bash $BASH_VERSION found, 4.4 or later expected; on macOS: brew install bash" >&2
  exit 2
fi

dry_run=

# Prints the comment that heads the script.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Stops with one line that says what was found, what was expected and what to do.
fail() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 2
}

# Stops unless every named setting has a value.
need() {
  local setting
  for setting in "$@"; do
    [[ ${!setting} ]] || fail "no --${setting//_/-} given; add --${setting//_/-}=VALUE (--help)"
  done
}

# Stops unless every named setting is a positive integer. Shell arithmetic would take other text for
# the name of a variable, and run the commands in it.
need_count() {
  local setting
  for setting in "$@"; do
    [[ ${!setting} =~ ^[1-9][0-9]{0,5}$ ]] ||
      fail "--${setting//_/-} is '${!setting}'; give a positive integer"
  done
}

# The words on one line, from which a shell reads the same words.
quoted() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# Stops unless the flags after -- can be those of a training that lives in the directory given first.
check_training() {
  [[ $1 ]] || fail 'no --workdir given; add --workdir=DIR, a path all machines share'
  [[ $1 == /* ]] || fail "--workdir=$1 is relative; give a path all machines share"
  [[ " ${*:2} " == *' --config='* ]] ||
    fail 'no --config after --; add -- --config=configs/TASK.py:PRESET'
  [[ " ${*:2} " != *' --workdir='* ]] || fail '--workdir found after --; give it before'
}
