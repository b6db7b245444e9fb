/**
 * Completion scripts for shells, from the table of options.
 *
 * @module
 */

import { markOf } from "../ffi/dscp.ts";
import { optionRows, type Shell, SHELLS } from "./options.ts";

/** The completion script of a shell, from the table of options. */
export function completions(shell: Shell): string {
  const names = Array.from({ length: 64 }, (_, dscp) => markOf(dscp << 2).name);
  const marks = ["EF", ...names.filter((name) => name !== null && name !== "EF"), "all"];
  const quoted = (text: string) => `'${text.replaceAll("'", "'\\''")}'`;
  const options = optionRows().map((row) => {
    const words = row.value === "SHELL" ? SHELLS : row.value.startsWith("NAME") ? marks : [];
    return { ...row, words: words.join(" ") };
  });
  if (shell === "fish") {
    return options.reduce((script, { flags, value, help, words }) => {
      const names = flags.map((flag) => flag.replace("--", "-l ").replace(/^-(?=.$)/, "-s "));
      const list = value.includes(",") ? `(__fish_append , ${words})` : words;
      const values = value === "" ? "" : value === "FILE" ? "-r -F" : `-x -a ${quoted(list)}`;
      return `${script}complete -c dscp-get ${names.join(" ")} ${values} -d ${quoted(help)}\n`;
    }, "complete -c dscp-get -f\n");
  }
  if (shell === "zsh") {
    const escaped = (text: string) => text.replace(/[[\]:]/g, "\\$&");
    const specs = options.flatMap(({ flags, value, help, words }) => {
      const list = value.includes(",") ? `_sequence compadd - ${words}` : `(${words})`;
      const values = value && `:${escaped(value)}:${value === "FILE" ? "_files" : words && list}`;
      const end = (flag: string) => value && (flag.length > 2 ? "=" : "+");
      return flags.map((flag) => quoted(`*${flag}${end(flag)}[${escaped(help)}]${values}`));
    });
    return `#compdef dscp-get
_dscp-get() { _arguments -s -S ${specs.join(" \\\n  ")} '*:URL:_urls'; }
if [[ $funcstack[1] == _dscp-get ]]; then _dscp-get "$@"; else compdef _dscp-get dscp-get; fi\n`;
  }
  const cases = options.filter(({ value }) => value !== "").map(({ flags, value, words }) => {
    const list = `COMPREPLY=($(compgen -P "\${cur%"$last"}" -W '${words}' -- "$last"))`;
    const action = value === "FILE" ? "compopt -o default" : words && list;
    return `    ${flags.join("|")}) ${action} ;;\n`;
  });
  return `_dscp_get() {
  local cur=\${COMP_WORDS[COMP_CWORD]} prev=\${COMP_WORDS[COMP_CWORD-1]}
  # --dscp=EF comes as three words.
  if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=\${COMP_WORDS[COMP_CWORD-2]}; fi
  local last=\${cur##*,} options='${options.flatMap(({ flags }) => flags).join(" ")}'
  case $prev in
${cases.join("")}    *) [[ $cur != -* ]] || COMPREPLY=($(compgen -W "$options" -- "$cur")) ;;
  esac
}
complete -F _dscp_get dscp-get
`;
}
