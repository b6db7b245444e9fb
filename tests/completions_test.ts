import assert from "node:assert/strict";
import { completions } from "../src/completions.ts";
import { SHELLS } from "../src/options.ts";
import { Folder } from "./support/folder.ts";
import { dscpGet, optionsOf, testWith } from "./support/processes.ts";

/** Runs a shell with a completion script in a file, in a home folder of its own. */
async function withScript(
  shell: string,
  words: (file: string) => readonly string[],
): Promise<string> {
  await using home = await Folder.create();
  const script = await dscpGet(["--completions", shell]);
  assert.deepEqual([script.code, script.stderr], [0, ""]);
  const file = `${home.path}/script`;
  await Deno.writeTextFile(file, script.stdout);
  const { stdout, stderr } = await home.run(shell, ...words(file));
  assert.equal(stderr, "");
  return stdout;
}

for (const shell of ["bash", "zsh", "fish"]) {
  testWith(
    [shell],
    `--completions: ${shell} reads the script, which has every option`,
    async () => {
      await withScript(shell, (file) => ["-n", file]);
      const { stdout: script } = await dscpGet(["--completions", shell], { flags: [] });
      const { stdout: help } = await dscpGet(["--help"]);
      const options = optionsOf(help);
      assert.ok(options.length > 15, "the help lists the options");
      for (const { short, long } of options) {
        const names = [...short === null ? [] : [short], long].map((name) =>
          name.replace(/^-+/, "")
        );
        const flags = names.map((name) =>
          shell !== "fish" ? new RegExp(`[ '*]-{1,2}${name}\\b`) : new RegExp(` -[sl] ${name} `)
        );
        for (const flag of flags) assert.match(script, flag);
      }
    },
  );
}

// What is typed behind `dscp-get`, as bash splits it, and what is offered for the last word.
const NAMES = ["AF41", "AF42", "AF43"];
for (
  const [typed, offered] of [
    [["--mark"], ["--mark-syn"]],
    [["--json", "--connect"], ["--connect-timeout"]],
    [["http://192.0.2.1/", "--ins"], ["--insecure"]],
    [["-d", "AF4"], NAMES],
    [["--dscp", "EF,AF4"], NAMES.map((name) => `EF,${name}`)],
    [["--dscp", "=", "AF4"], NAMES],
    [["--dscp", "=", "EF,AF4"], NAMES.map((name) => `EF,${name}`)],
    [["--completions", ""], ["bash", "zsh", "fish"]],
    [["--completions", "="], ["bash", "zsh", "fish"]],
    [["--count", ""], []],
    [["-H", "-"], []],
    [[""], []],
    [["nothing"], []],
  ] as const
) {
  const line = typed.join(" ").replace(" = ", "=").replace(/ =$/, "=");

  testWith(["bash"], `--completions: bash completes 'dscp-get ${line}'`, async () => {
    const program = `source "$0"; COMP_WORDS=(dscp-get "$@") COMP_CWORD=$#
      _dscp_get; [ \${#COMPREPLY[@]} = 0 ] || printf '%s\\n' "\${COMPREPLY[@]}"`;
    const said = await withScript("bash", (file) => ["-c", program, file, ...typed]);
    assert.deepEqual(said.split("\n").slice(0, -1), offered);
  });
}

testWith(
  ["zsh"],
  "--completions: zsh takes the script, sourced or as a file of fpath",
  async () => {
    const load = "autoload -U compinit; compinit -u -D";
    const sourced = `${load}; source "$0"; print $_comps[dscp-get]`;
    assert.equal(await withScript("zsh", (file) => ["-f", "-c", sourced, file]), "_dscp-get\n");
    const found = `mv "$0" "\${0:h}/_dscp-get"; fpath=("\${0:h}" $fpath); ${load}
    print $_comps[dscp-get]; autoload +X _dscp-get; print $+functions[_dscp-get]`;
    assert.equal(await withScript("zsh", (file) => ["-f", "-c", found, file]), "_dscp-get\n1\n");
  },
);

testWith(["fish"], "--completions: fish completes options, lists of marks and files", async () => {
  const complete = async (line: string) => {
    const said = await withScript("fish", (file) => {
      const program = `source '${file}'; complete -C 'dscp-get ${line}'`;
      return ["--no-config", "-c", program];
    });
    return said.trim().split("\n").map((offer) => offer.split("\t")[0]);
  };
  assert.deepEqual(await complete("--mark"), ["--mark-syn"]);
  assert.deepEqual(await complete("-d EF,AF4"), NAMES.map((name) => `EF,${name}`));
  assert.deepEqual(await complete("--cacert /etc/nsswitch.con"), ["/etc/nsswitch.conf"]);
});

Deno.test("--completions: another shell is bad usage", async () => {
  const { code, stderr } = await dscpGet(["--completions", "tcsh"]);
  assert.equal(code, 2);
  assert.match(stderr, /^dscp-get: --completions takes bash, zsh or fish, not 'tcsh'\n/);
});

const MARKS = "EF DF LE CS1 AF11 AF12 AF13 CS2 AF21 AF22 AF23 CS3 AF31 AF32 AF33 CS4 AF41 AF42 " +
  "AF43 CS5 VA NQB CS6 CS7 all";

for (
  const [shell, lines] of [
    ["bash", [
      `    -d|--dscp) COMPREPLY=($(compgen -P "\${cur%"$last"}" -W '${MARKS}' -- "$last")) ;;`,
      `    --cacert) compopt -o default ;;`,
      `    -n|--count)  ;;`,
      `complete -F _dscp_get dscp-get`,
    ]],
    ["zsh", [
      `#compdef dscp-get`,
      `if [[ $funcstack[1] == _dscp-get ]]; then _dscp-get "$@"; else compdef _dscp-get dscp-get; fi`,
      `  '*-m+[time limit for each request in seconds, and for the path of --trace (default 30; ` +
      `0\\: none)]:S:' \\`,
      `  '*--interval=[seconds between requests (default 0)]:S:' \\`,
      `  '*-S[accepted as in curl\\: errors are always shown]' \\`,
      `  '*--max-hops=[the most hops to try, 1 to 64 (default 30)]:N:' \\`,
      `  '*-k[accept any certificate]' \\`,
      `  '*--cacert=[trust only FILE'\\''s certificates (PEM; --allow-read)]:FILE:_files' \\`,
      `  '*--completions=[completion script for bash, zsh or fish, for an installed dscp-get]` +
      `:SHELL:(bash zsh fish)' \\`,
    ]],
    ["fish", [
      `complete -c dscp-get -f`,
      `complete -c dscp-get -s 4 -l ipv4  -d 'IPv4 addresses only'`,
      `complete -c dscp-get -s s -l silent  -d 'no report'`,
      `complete -c dscp-get -l cacert -r -F -d 'trust only FILE'\\''s certificates (PEM; --allow-read)'`,
      `complete -c dscp-get -l interval -x -a '' -d 'seconds between requests (default 0)'`,
      `complete -c dscp-get -l completions -x -a 'bash zsh fish' -d 'completion script for bash, ` +
      `zsh or fish, for an installed dscp-get'`,
    ]],
  ] as const
) {
  Deno.test(`--completions: the lines for ${shell}`, () => {
    const script = completions(shell).split("\n");
    for (const line of lines) assert.ok(script.includes(line), line);
    assert.equal(script.at(-1), "");
  });
}

Deno.test("--completions: each script offers each mark once, by its first name, in a list", () => {
  const lists = {
    bash: `-W '${MARKS}'`,
    zsh: `:_sequence compadd - ${MARKS}'`,
    fish: `-x -a '(__fish_append , ${MARKS})'`,
  };
  assert.deepEqual(Object.keys(lists), SHELLS);
  for (const shell of SHELLS) assert.ok(completions(shell).includes(lists[shell]), shell);
});
