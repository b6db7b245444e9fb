/**
 * Folders of their own for tests: temporary files, and a home for programs that keep files in it.
 *
 * @module
 */

import { execute, type Outcome } from "./processes.ts";

/** The folder of this checkout, with a slash at its end. */
export const ROOT = new URL("../..", import.meta.url).pathname;

/** PATH with the folder of this Deno, so that scripts find it as `deno`. */
export const DENO_PATH = `${Deno.execPath().replace(/\/[^/]+$/, "")}:${Deno.env.get("PATH")}`;

/** A temporary folder, removed with all that is in it when disposed of. */
export class Folder implements AsyncDisposable {
  private constructor(readonly path: string) {}

  static async create(): Promise<Folder> {
    return new Folder(await Deno.makeTempDir({ prefix: "dscp-get-" }));
  }

  /** Runs a program with this folder as its home. @throws if its exit code is not 0 */
  async run(...words: string[]): Promise<Outcome> {
    const outcome = await execute(words, this.env);
    if (outcome.code !== 0) {
      throw new Error(`${words.join(" ")}: exit ${outcome.code}: ${outcome.stderr}`);
    }
    return outcome;
  }

  /** The environment of a program whose home this folder is, with Deno's own cache in it too. */
  get env(): Record<string, string> {
    const { path } = this;
    return {
      NO_COLOR: "1",
      // An installed command finds deno by PATH.
      PATH: `${path}/bin:${DENO_PATH}`,
      HOME: path,
      XDG_CONFIG_HOME: path,
      XDG_DATA_HOME: path,
      DENO_DIR: `${path}/cache`,
      DENO_INSTALL_ROOT: path,
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.path, { recursive: true });
  }
}
