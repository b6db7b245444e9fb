/**
 * Pseudo-random numbers that a seed repeats, for generated input.
 *
 * @module
 */

/** The seed of the fuzz tests, from the environment variable `SEED`; a failing test prints it. */
export const SEED = Number(Deno.env.get("SEED") ?? 20260722);

/** A generator that gives the same numbers for the same seed (mulberry32). */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed;
  }

  /** Returns an integer from 0 to `limit` - 1. */
  below(limit: number): number {
    this.#state = this.#state + 0x6d2b79f5 | 0;
    let t = Math.imul(this.#state ^ this.#state >>> 15, 1 | this.#state);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) % limit;
  }

  /** Returns one of the values. */
  oneOf<T>(values: readonly T[]): T {
    return values[this.below(values.length)];
  }

  /** Returns the first value in three of four cases, else one of the others. */
  mostly<T>(...[first, ...others]: T[]): T {
    return this.below(8) < 6 ? first : this.oneOf(others);
  }

  /** Returns a text of random bytes, one character per byte. */
  bytes(size: number): string {
    return String.fromCharCode(...Array.from({ length: size }, () => this.below(256)));
  }
}
