import type { RequestHandler } from 'express';
import { AppError } from '../lib/errors.js';

function isLoopback(address: string): boolean {
  return address === '::1' || address.replace(/^::ffff:/, '').startsWith('127.');
}

function hostsOf(address: string, port: number): Set<string> {
  const names = ['localhost', '127.0.0.1', '[::1]', address.replace(/^::ffff:/, '')];
  // Clients leave the default port of their scheme out.
  const isDefaultPort = port === 80 || port === 443;
  return new Set(names.flatMap((name) => [`${name}:${port}`, ...(isDefaultPort ? [name] : [])]));
}

/**
 * Refuses a request over loopback whose Host is not this daemon: a web page whose name an attacker
 * points at 127.0.0.1 (DNS rebinding) cannot talk to it.
 */
export const checkHost: RequestHandler = (req, _res, next) => {
  const { localAddress = '', localPort = 0 } = req.socket;
  const host = (req.headers.host ?? '').toLowerCase();
  if (isLoopback(localAddress) && !hostsOf(localAddress, localPort).has(host)) {
    throw new AppError('HOST_REFUSED', 'the Host header does not name this daemon');
  }
  next();
};

const JSON_TYPE = /^application\/json(\s*;\s*charset=utf-8)?$/i;

/**
 * Leaves one spelling of the content type, and none where no body is taken: the validator keeps a
 * compiled schema for each spelling it meets, which a client could make grow without end.
 */
export const normaliseContentType: RequestHandler = (req, _res, next) => {
  const hasBody =
    req.headers['transfer-encoding'] !== undefined || Number(req.headers['content-length'] ?? 0) > 0;
  const contentType = req.headers['content-type'];
  if (hasBody && (contentType === undefined || !JSON_TYPE.test(contentType))) {
    throw new AppError('MEDIA_TYPE_UNSUPPORTED', 'the body is not application/json');
  }
  if (req.method === 'POST') req.headers['content-type'] = 'application/json';
  else delete req.headers['content-type'];
  next();
};
