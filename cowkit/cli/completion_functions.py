r"""The functions of shells that complete the names of what is being served, see :mod:`cowkit.cli.served_argument`.

They ask cowkit itself, which takes a tenth of a second. What fails is silent, and what hangs is given up: a server that is stuck
must not hold up who types.
"""

from __future__ import annotations

BASH = r"""
# $1=format of printf, $2=what is typed; names, one a line, from standard input
_cowkit_matching() {
  local name
  while IFS= read -r name; do
    [[ $name != "$2"* ]] || printf "$1\n" "$name"
  done
}
_cowkit_server_names() {
  timeout 2 "${COMP_WORDS[0]}" ls 2>/dev/null </dev/null | sed -n '2,$s/  .*//p'
}
_cowkit_servers() { _cowkit_server_names | _cowkit_matching %q "$1"; }
# bash quotes what it takes for names of files
_cowkit_servers_and_files() { _cowkit_server_names | _cowkit_matching %s "$1"; compgen -f -- "$1"; }
_cowkit_checkpoints() {
  local at chosen=()
  for ((at = 1; at < COMP_CWORD; at++)); do
    if [[ ${COMP_WORDS[at]} == --base || ${COMP_WORDS[at]} == --from ]]; then
      chosen+=("${COMP_WORDS[at]}")
      [[ ${COMP_WORDS[at + 1]} != = ]] || ((at++))
      chosen+=("${COMP_WORDS[++at]}")
    fi
  done
  timeout 2 "${COMP_WORDS[0]}" checkpoint --list "${chosen[@]}" 2>/dev/null </dev/null | _cowkit_matching %q "$1"
}
"""

ZSH = r"""
_cowkit_servers() {
  local -a names
  names=(${(f)"$(timeout 2 cowkit ls 2>/dev/null </dev/null | sed -n '2,$s/  .*//p')"})
  compadd -a names
}
_cowkit_servers_and_files() { _cowkit_servers; _files }
_cowkit_checkpoints() {
  local -a names chosen
  local at
  for ((at = 1; at < $#words; at++)); do
    case $words[at] in
      (--base|--from) chosen+=($words[at] "${(Q)words[at + 1]}") ;;
      (--base=*|--from=*) chosen+=("${(Q)words[at]}") ;;
    esac
  done
  names=(${(f)"$(timeout 2 cowkit checkpoint --list $chosen 2>/dev/null </dev/null)"})
  compadd -a names
}
"""
