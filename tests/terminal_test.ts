import assert from "node:assert/strict";
import { command, execute, succeed, testWith } from "./support/processes.ts";
import { OK, RawServer, readRequest, replying, send } from "./support/servers.ts";
import { until } from "./support/waiting.ts";

/** A terminal of its own in tmux, and what a person sees on it; gone when disposed of. */
class Terminal implements AsyncDisposable {
  readonly #folder = Deno.makeTempDirSync({ prefix: "dscp-get-" });
  readonly #socket = `${this.#folder}/socket`;

  /** Starts a terminal of this many columns, with 24 rows. */
  static async start(columns: number): Promise<Terminal> {
    const terminal = new Terminal();
    const size = ["-x", String(columns), "-y", "24"];
    await terminal.#tmux("-f", "/dev/null", "new-session", "-d", ...size, "PS1= exec sh");
    await terminal.#tmux("set-option", "-g", "history-limit", "5000");
    return terminal;
  }

  async #tmux(...words: string[]): Promise<string> {
    return (await succeed("tmux", "-S", this.#socket, ...words)).stdout;
  }

  /** Types keys, as tmux names them. */
  async type(...keys: string[]): Promise<void> {
    await this.#tmux("send-keys", ...keys);
  }

  /** Changes the width, and waits until programs see it. */
  async resize(columns: number): Promise<void> {
    await this.#tmux("resize-window", "-x", String(columns), "-y", "24");
    const tty = (await this.#tmux("display-message", "-p", "#{pane_tty}")).trim();
    const size = async () => (await succeed("stty", "-F", tty, "size")).stdout.trim();
    await until(async () => await size() === `24 ${columns}`, `a width of ${columns}`);
  }

  /** All lines, those that have scrolled off included, as they are on the screen. */
  async lines(): Promise<string[]> {
    const text = await this.#tmux("capture-pane", "-p", "-S", "-");
    return text.split("\n").map((line) => line.trimEnd());
  }

  /** Runs a shell command; waits for its end. @returns its lines and exit code */
  async run(shell: string): Promise<{ lines: string[]; code: number }> {
    await this.start(shell);
    return await this.end();
  }

  async start(shell: string): Promise<void> {
    await this.type("-l", `clear; tput E3; ${shell}; echo "exit=$?"`);
    await this.type("Enter");
  }

  async end(): Promise<{ lines: string[]; code: number }> {
    const lines = await this.until((lines) => lines.some((line) => /^exit=\d+$/.test(line)));
    const last = lines.findIndex((line) => /^exit=\d+$/.test(line));
    return { lines: lines.slice(0, last), code: Number(lines[last].slice(5)) };
  }

  async until(passes: (lines: string[]) => boolean): Promise<string[]> {
    let lines: string[] = [];
    await until(async () => passes(lines = await this.lines()), "text on the terminal", 30);
    return lines;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await execute(["tmux", "-S", this.#socket, "kill-server"]);
    await Deno.remove(this.#folder, { recursive: true });
  }
}

const words = (...args: string[]) => command(args).join(" ");

for (const columns of [60, 80, 100, 130]) {
  testWith(
    ["tmux"],
    `a live table leaves nothing behind but the final one, at ${columns} columns`,
    async () => {
      await using server = replying(OK);
      await using terminal = await Terminal.start(columns);
      const { lines, code } = await terminal.run(words("-d", "EF,DF,VA", "-n", "200", server.url));
      assert.equal(code, 0, lines.join("\n"));
      // The command itself may take several lines.
      const table = lines.slice(lines.findLastIndex((line) => /^ +wrong/.test(line)));
      assert.match(table[1], /^mark sent arrived requests failed +mark/);
      assert.deepEqual(table.slice(2, 5).map((line) => line.split(/ +/)[0]), ["EF", "DF", "VA"]);
      assert.match(table.slice(5).join(" "), /^Against DF, median total time: .*\.$/);
      assert.ok(table.every((line) => line.length <= Math.min(80, columns)));
      const all = (await terminal.lines()).join("\n");
      assert.equal(all.match(/wrong/g)!.length, 1, "one table, in the scrollback too");
      assert.doesNotMatch(all, /Ctrl-C to stop/);
    },
  );
}

testWith(
  ["tmux"],
  "a live table survives a terminal that becomes narrower, and Ctrl-C",
  async () => {
    let served = 0;
    const drawn = Promise.withResolvers<void>(), resized = Promise.withResolvers<void>();
    const many = Promise.withResolvers<void>();
    await using server = new RawServer(async (conn) => {
      await readRequest(conn);
      // Nothing is drawn while the terminal changes: a program learns its new size some time after.
      if (++served === 400) await (drawn.resolve(), resized.promise);
      if (served === 800) many.resolve();
      await send(conn, OK);
    });
    await using terminal = await Terminal.start(100);
    // tmux moves as many lines into the scrollback as it wraps; these are above the table.
    await terminal.start(`seq 10; ${words("-d", "EF,DF", "-n", "100000", server.url)}`);
    await drawn.promise;
    await terminal.resize(62);
    resized.resolve();
    await many.promise;
    await terminal.until((lines) => lines.some((line) => line.includes("Ctrl-C to stop")));
    await terminal.type("C-c");
    const { lines, code } = await terminal.end();
    assert.equal(code, 130, lines.join("\n"));
    const at = lines.findLastIndex((line) => /^ +wrong/.test(line));
    assert.match(lines[at + 1], /^mark sent arrived/);
    assert.match(lines[at + 2], /^EF +0xB8/);
    assert.equal(lines.join("\n").match(/^mark /gm)!.length, 1, lines.join("\n"));
  },
);

testWith(
  ["tmux"],
  "live lines that fill the screen are cut to the last one, which can be replaced",
  async () => {
    await using terminal = await Terminal.start(80);
    const output = new URL("../src/output.ts", import.meta.url);
    for (const [count, first] of [[23, 1], [24, 24]]) {
      const text = `Array.from({ length: ${count} }, (_, at) => "line " + (at + 1)).join("\\n")`;
      const script =
        `import { LiveText } from "${output}"; new LiveText(true).update(() => ${text});`;
      const { lines, code } = await terminal.run(`${Deno.execPath()} eval '${script}'`);
      const expected = Array.from({ length: count - first + 1 }, (_, at) => `line ${first + at}`);
      assert.deepEqual([code, lines], [0, expected]);
    }
  },
);
