/**
 * Waiting with a limit: for a condition, and for a whole test. Importing this module gives every test
 * of a file the limit; `processes.ts` imports it.
 *
 * @module
 */

/** How long a test may take, in seconds: many times what the slowest one takes. */
const TEST_SECONDS = 180;

// Deno has the limit as an option of each test, and no flag or setting for all of them. It ends an
// endless loop as well as a wait, fails that test alone, and goes on with the next.
const declare = Deno.test;

/** Deno.test with the limit, in the two forms that are used here. */
function limited(
  test: string | Deno.TestDefinition,
  fn?: (context: Deno.TestContext) => void | Promise<void>,
): void {
  const timeout = TEST_SECONDS * 1000;
  declare({ timeout, ...typeof test === "string" ? { name: test, fn: fn! } : test });
}

Object.assign(Deno, { test: Object.assign(limited, Deno.test) });

/**
 * Waits until a condition holds, and returns its value. Asks again every few milliseconds.
 *
 * @param condition returns or resolves to something truthy once it holds
 * @param what what is waited for, for the message
 * @throws if it does not hold within so many seconds
 */
export async function until<T>(
  condition: () => T | false | null | Promise<T | false | null>,
  what: string,
  seconds = 10,
): Promise<T> {
  const end = performance.now() + seconds * 1000;
  for (;;) {
    const value = await condition();
    if (value) return value;
    if (performance.now() > end) throw new Error(`waited ${seconds} s for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** Settles as a promise does. @throws if it does not within so many seconds */
export async function within<T>(
  promise: Promise<T>,
  what: string | (() => string),
  seconds = 10,
): Promise<T> {
  const late = Promise.withResolvers<never>();
  const fail = () =>
    late.reject(new Error(`waited ${seconds} s for ${typeof what === "string" ? what : what()}`));
  const timer = setTimeout(fail, seconds * 1000);
  try {
    return await Promise.race([promise, late.promise]);
  } finally {
    clearTimeout(timer);
  }
}
