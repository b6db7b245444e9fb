/**
 * The version, which only `deno.json` states.
 *
 * @module
 */

import config from "../deno.json" with { type: "json" };

/** The version of this program, such as `0.3.0`. */
export const VERSION: string = config.version;
