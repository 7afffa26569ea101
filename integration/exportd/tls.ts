import { randomBytes } from 'node:crypto';
import { copyFile, mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { runTool } from '../../src/lib/process.js';

const TOOL = { timeoutMs: 30_000 };

/** A key file as psktool writes it: one line for each user. */
export async function makeKeys(file: string, ...users: string[]): Promise<string> {
  const lines = users.map((user) => `${user}:${randomBytes(32).toString('hex')}\n`);
  await writeFile(file, lines.join(''), { mode: 0o600 });
  return file;
}

export interface Authority {
  /** As QEMU wants it of a server. */
  serverDirectory: string;
  /** As libnbd wants it of a client. */
  clientDirectory(name: string): Promise<string>;
}

/** A certificate authority with a server for 127.0.0.1. */
export async function makeAuthority(directory: string): Promise<Authority> {
  const file = (name: string) => path.join(directory, name);
  await mkdir(directory, { recursive: true });
  await makeKey(file('ca-key.pem'));
  await writeFile(file('ca.template'), 'cn = "Lab CA"\nca\ncert_signing_key\n');
  await runTool(
    'certtool',
    [
      ...['--generate-self-signed', '--load-privkey', file('ca-key.pem'), '--template', file('ca.template')],
      ...['--outfile', file('ca-cert.pem')],
    ],
    TOOL,
  );
  const issue = async (name: string, role: 'server' | 'client'): Promise<string> => {
    const own = file(name);
    await mkdir(own);
    await copyFile(file('ca-cert.pem'), path.join(own, 'ca-cert.pem'));
    await makeKey(path.join(own, `${role}-key.pem`));
    const template = path.join(own, 'template');
    await writeFile(
      template,
      `cn = "${name}"\norganization = "Lab"\nip_address = "127.0.0.1"\ntls_www_${role}\nencryption_key\nsigning_key\n`,
    );
    await runTool(
      'certtool',
      [
        ...['--generate-certificate', '--load-privkey', path.join(own, `${role}-key.pem`)],
        ...['--load-ca-certificate', file('ca-cert.pem'), '--load-ca-privkey', file('ca-key.pem')],
        ...['--template', template, '--outfile', path.join(own, `${role}-cert.pem`)],
      ],
      TOOL,
    );
    return own;
  };
  return {
    serverDirectory: await issue('server', 'server'),
    clientDirectory: (name) => issue(name, 'client'),
  };
}

async function makeKey(file: string): Promise<void> {
  await runTool('certtool', ['--generate-privkey', '--key-type=ecc', '--outfile', file], TOOL);
}
