import { createHash } from 'node:crypto';
import { open } from 'node:fs/promises';
import path from 'node:path';
import type { ExportIdentity } from '../exports/index.js';
import { AppError, errnoOf } from '../lib/errors.js';
import { MIB } from '../lib/units.js';
import type { TlsSettings } from './config.js';

/** What a listener's server proves itself with, and whom it lets in. */
export type Credentials =
  | { kind: 'psk'; /** Lines `user:key`: a secret. */ keys: string }
  | { kind: 'x509'; directory: string; clientNames: readonly string[] | null };

const KEY_LINE = /^([^:\s]{1,255}):((?:[0-9a-fA-F]{2}){16,256})$/;

/** Of the shared port. CONFIG_INVALID when they cannot be read. */
export async function sharedCredentials(
  kind: 'none' | 'psk' | 'x509',
  { psk, x509 }: TlsSettings,
): Promise<Credentials | null> {
  if (kind === 'none') return null;
  if (kind === 'x509') {
    if (x509 === null) throw new AppError('CONFIG_INVALID', 'tls.x509 is not set');
    return { kind, directory: x509.directory, clientNames: x509.clientNames };
  }
  const keysFile = psk?.keysFile ?? null;
  if (keysFile === null) throw new AppError('CONFIG_INVALID', 'tls.psk.keysFile is not set');
  const keys = await readKeys(keysFile);
  return { kind, keys: keys.map(({ line }) => line).join('') };
}

/** That let in one identity alone. CONFIG_INVALID when the daemon is not set up for it, or knows no such user. */
export async function identityCredentials(
  identity: ExportIdentity,
  { psk, x509 }: TlsSettings,
): Promise<Credentials> {
  if (identity.kind === 'x509') {
    if (x509 === null)
      throw new AppError('CONFIG_INVALID', 'an identity by certificate needs tls.x509.directory');
    return { kind: 'x509', directory: x509.directory, clientNames: [identity.distinguishedName] };
  }
  const directory = psk?.identitiesDirectory ?? null;
  if (directory === null) {
    throw new AppError('CONFIG_INVALID', 'an identity by key needs tls.psk.identitiesDirectory');
  }
  const file = path.join(directory, `${identity.user}.psk`);
  const [key, ...others] = await readKeys(file);
  if (key?.user !== identity.user || others.length > 0) {
    throw new AppError('CONFIG_INVALID', `${file} must hold one key, of the user ${identity.user}`);
  }
  return { kind: 'psk', keys: key.line };
}

/** Same credentials, same text; says nothing of the keys. */
export function fingerprint(credentials: Credentials | null): string {
  return createHash('sha256').update(JSON.stringify(credentials)).digest('hex');
}

async function readKeys(file: string): Promise<{ user: string; line: string }[]> {
  const text = await readPrivateFile(file);
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'));
  if (lines.length === 0) throw new AppError('CONFIG_INVALID', `${file} holds no key`);
  return lines.map((line, index) => {
    const user = KEY_LINE.exec(line)?.[1];
    // The line itself is a secret.
    if (user === undefined)
      throw new AppError('CONFIG_INVALID', `${file}: key ${index + 1} is not user:hexadecimal`);
    return { user, line: `${line}\n` };
  });
}

async function readPrivateFile(file: string): Promise<string> {
  try {
    const handle = await open(file, 'r');
    try {
      const { mode, size } = await handle.stat();
      if ((mode & 0o007) !== 0)
        throw new AppError('CONFIG_INVALID', `${file} holds keys, and everybody may use it`);
      if (size > MIB) throw new AppError('CONFIG_INVALID', `${file} is larger than 1 MiB`);
      return await handle.readFile('utf8');
    } finally {
      await handle.close();
    }
  } catch (error) {
    if (error instanceof AppError) throw error;
    throw new AppError('CONFIG_INVALID', `${file} cannot be read: ${errnoOf(error) ?? 'unknown error'}`, {
      cause: error,
    });
  }
}
