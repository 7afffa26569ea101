export { createApi, type ApiConfig, type ApiOptions } from './app.js';
export { startApi, type ApiServer } from './server.js';
