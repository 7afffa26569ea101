import { rename, rm, writeFile } from 'node:fs/promises';

/** Readable for everybody who may enter the directory: it holds no secret. */
const MODE = 0o644;

/** Replaces a small file so that readers see the old one or the new one, whole. Not synced: it tells of this process. */
export async function replaceFile(file: string, text: string): Promise<void> {
  const partial = `${file}.partial`;
  try {
    await writeFile(partial, text, { mode: MODE });
    await rename(partial, file);
  } finally {
    await rm(partial, { force: true });
  }
}
