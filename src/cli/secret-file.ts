import { open } from 'node:fs/promises';
import { errnoOf } from '../lib/errors.js';
import { usageFailure } from './failure.js';
import { safeText } from './text.js';

/** A new file, mode 0600, for what is shown once. Make it before the secret: one that cannot be kept is of no use. */
export async function createSecretFile(
  file: string,
): Promise<AsyncDisposable & { writeFile(text: string): Promise<void> }> {
  try {
    const handle = await open(file, 'wx', 0o600);
    return {
      writeFile: (text) => handle.writeFile(text),
      [Symbol.asyncDispose]: () => handle.close(),
    };
  } catch (error) {
    throw usageFailure(
      `${safeText(file)} cannot be made (${errnoOf(error) ?? 'error'})`,
      'Name a file that does not exist yet.',
    );
  }
}
